"""What a MODEL's own weights are, whatever the host has loaded, offloaded or patched at the moment."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor
from torch.nn.functional import pad

SAMPLES = 8  # of each parameter
FORMATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def sampled_weights(model: ModelPatcher) -> tuple[Tensor, Tensor]:
    """Some weights of the diffusion model [parameters, SAMPLES], merges included, and how finely each is known.

    The second is never less than the distance to the next number of the format that a weight was last stored in, so
    that the same weights in two formats differ by no more than the coarser one's. LoRAs count for nothing.
    """
    owners, coefficients, rows, scales = [], [], [], []
    named = model.model.diffusion_model.named_parameters(prefix="diffusion_model")
    # Scaled fp8 layers list their bias first, and scales of their own.
    parameters = sorted((name, parameter) for name, parameter in named if name.endswith(("weight", "bias")))
    for at, (name, parameter) in enumerate(parameters):
        for coefficient, weight in _terms(_unpatched(model, name, parameter), model.patches.get(name, [])):
            row, scale = _sampled(weight)
            owners.append(at)
            coefficients.append(coefficient)
            rows.append(row)
            scales.append(scale)
    stored, scale = torch.stack(rows), torch.tensor(scales)[:, None]
    weights, spacing = torch.zeros(2, len(parameters), SAMPLES)
    weight, owner = torch.tensor(coefficients)[:, None] * scale, torch.tensor(owners)
    return weights.index_add(0, owner, weight * stored), spacing.index_add(0, owner, weight.abs() * _spacing(stored))


def _unpatched(model: ModelPatcher, name: str, parameter: Tensor) -> Tensor:
    """A parameter as its checkpoint has it: the host keeps aside what it patches in place."""
    if name in model.backup:
        return model.backup[name].weight
    return model.hook_backup[name][0] if name in model.hook_backup else parameter


def _terms(weight: Tensor, patches: list[tuple]) -> Iterator[tuple[float, Tensor]]:
    """Coefficients and weights that add up to what the merges among the host's `patches` make of `weight`.

    A merge is the one patch that is a list: the other model's weight, and the patches on it.
    """
    merges = [patch for patch in patches if isinstance(patch[1], list)]
    kept = 1.0
    for strength, ((other, _), *others), strength_model, *_ in reversed(merges):
        if other.shape == weight.shape:  # or the host leaves it out
            yield from ((kept * strength * coefficient, term) for coefficient, term in _terms(other, others))
        kept *= strength_model
    yield kept, weight


def _sampled(weight: Tensor) -> tuple[Tensor, float]:
    """The first of a parameter's numbers as they are stored [SAMPLES], and what they are multiplied by."""
    scale = 1.0
    if isinstance(weight, QuantizedTensor) and weight._layout_cls.startswith("TensorCoreFP8"):
        weight, scale = weight._qdata, float(weight._params.scale)
    first = weight[0] if weight.ndim > 1 else weight  # a view: the whole may be a copy of many megabytes
    first = first.detach().flatten()[:SAMPLES].to("cpu", torch.float32)
    return pad(first, (0, SAMPLES - len(first))), scale


def _spacing(rows: Tensor) -> Tensor:
    """[n, SAMPLES]: no less than the distance to the next number in any format that holds the whole row."""
    spacing = torch.zeros_like(rows)
    for dtype in FORMATS:
        held = (rows.to(dtype).float() == rows).all(1, keepdim=True)
        info = torch.finfo(dtype)
        spacing = spacing.maximum(held * (rows.abs() + info.smallest_normal) * info.eps)
    return spacing
