"""Regularised inversion (pix2pix-zero, arXiv 2302.03027, section 3.1): inverted noise made more like white noise.

Gradient steps on the predicted noise, after each call of the network and not through it, lower its autocorrelation over
a pyramid of sizes (L_pair) and the divergence of its mean and variance from those of a normal distribution (L_KL).
Pure torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

OUTER, INNER = 5, 5  # rounds of both losses, and of autocorrelation steps within one
SMALLEST = 8  # side at which the pyramid ends
TINY = 1e-7  # keeps the logarithm of a constant image's variance finite

Shifts = list[tuple[int, int]]


def random_shifts(size: tuple[int, int], generator: torch.Generator) -> Shifts:
    """For each size of the pyramid a distance down and one across, from 1 to under half of the side, never 0."""
    shifts = []
    for sides in _pyramid(size):
        down, across = (int(torch.randint(1, max(side // 2, 2), (), generator=generator)) for side in sides)
        shifts.append((down, across))
    return shifts


def autocorrelation(noise: Tensor, shifts: Shifts) -> Tensor:
    """L_pair of each image [b]: the squared mean product of the noise [b, c, h, w] with itself shifted, over channels.

    The paper sums over all distances; as in the authors' code these are single ones, drawn anew for each step.
    """
    loss = noise.new_zeros(len(noise))
    for i, (down, across) in enumerate(shifts):
        if i:
            noise = avg_pool2d(noise, 2)
        for distance, axis in ((down, 2), (across, 3)):
            loss = loss + (noise * noise.roll(distance, axis)).mean((2, 3)).square().sum(1)
    return loss


def divergence(noise: Tensor) -> Tensor:
    """L_KL of each image [b]: twice the divergence of a normal with its mean and variance from the standard one."""
    flat = noise.flatten(1)
    mean, variance = flat.mean(1), flat.var(1)
    return variance + mean.square() - 1 - (variance + TINY).log()


def regularised(eps: Tensor, pair_weight: float, kl_weight: float, generator: torch.Generator) -> Tensor:
    """eps [b, c, h, w] after the gradient steps; a weight of 0 leaves its loss out. Images do not mix."""
    for _ in range(OUTER):
        if pair_weight:
            for _ in range(INNER):
                shifts = random_shifts(tuple(eps.shape[2:]), generator)
                eps = eps - pair_weight / INNER * _gradient(eps, lambda noise, at=shifts: autocorrelation(noise, at))
        if kl_weight:
            eps = eps - kl_weight * _gradient(eps, divergence)
    return eps


def _pyramid(size: tuple[int, int]) -> list[tuple[int, int]]:
    sizes = [size]
    while min(sizes[-1]) > SMALLEST:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    return sizes


def _gradient(eps: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = eps.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    return gradient
