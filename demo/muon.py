"""Muon: gradient descent whose every step is the nearest orthogonal matrix to the averaged gradient.

Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the scale of arXiv
2502.16982, equation 4, which makes a step as large as AdamW's. Convolutions count as matrices of (outputs, all else).
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

# The quintic whose iteration takes singular values in (0, 1] near to 1.
A, B, C = 3.4445, -4.7750, 2.0315
# Rough numbers suffice, but without instructions for them they take ten times as long.
ROUGH = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


class Muon(torch.optim.Optimizer):
    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)  # matrices of one shape go through the iteration as one batch
            for parameter in group["params"]:
                alike[parameter.flatten(1).shape].append(parameter)
            for shape, parameters in alike.items():
                steps = orthogonal(torch.stack([self._averaged(p, group["momentum"]).flatten(1) for p in parameters]))
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, step in zip(parameters, steps, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(step.view_as(parameter), alpha=-size)

    def _averaged(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["average"] = torch.zeros_like(parameter)
        average = state["average"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Each of [n, rows, columns] with its singular values taken near to 1, in bfloat16's precision or better."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(ROUGH)
    for _ in range(iterations):
        square = x @ x.mT
        x = A * x + (B * square + C * square @ square) @ x
    return (x.mT if tall else x).float()
