"""TurboEdit (arXiv 2408.00735): edit-friendly DDPM inversion for models that were distilled to a few steps.

It is edit_friendly.py with two changes. The timestep told to the model is shifted: the image at a label t has the noise
of t less 200 of 1000, for noise maps of independent states look like those of less noise than there is, and few steps
do not make up for it. And the last map is held to the norm that sampled images have there. The paper's pseudo-guidance,
the source's step plus w times what the target's differs from it, is guidance w with the source's prompt as negative,
for a step is linear in the denoised estimate. Sampler space as in ddim.py. Pure torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .edit_friendly import independent_states

FIRST, SHIFT = 0.8, 0.2  # of the schedule: the first label, and how far labels are ahead of the noise
LARGEST = 15.5 / 128  # root mean square of the last map: a norm of 15.5 in 4 channels of 64 x 64


class Levels(NamedTuple):
    """labels: [steps + 1] falling sigmas that the model is told, 0 at last. held: those of the noise in the image."""

    labels: Tensor
    held: Tensor


def levels(table: Tensor, steps: int) -> Levels:
    """Labels of `steps` steps, evenly from 0.8 of the schedule to 0.2: 799, 599, 399 and 199 of 1000, or 799, 499, 199.

    table: the model's sigma for every timestep of its schedule, rising.
    """
    fractions = torch.linspace(FIRST, SHIFT, steps, dtype=torch.float64)

    def sigmas(of: Tensor) -> Tensor:
        at = (of * len(table)).round().long() - 1
        return torch.where(at < 0, 0.0, table[at.clamp(min=0)])

    end = table.new_zeros(1)
    return Levels(torch.cat([sigmas(fractions), end]), torch.cat([sigmas(fractions - SHIFT), end]))


def shifted_states(image: Tensor, levels: Levels, seed: int) -> list[Tensor]:
    """The image [b, c, h, w] under independent noise of the held levels, as the labels have the model see it."""
    scales = ((1 + levels.labels**2) / (1 + levels.held**2)).sqrt().tolist()
    states = independent_states(image, levels.held, seed)
    return [scale * state for scale, state in zip(scales, states, strict=True)]


def limited(noise_map: Tensor) -> Tensor:
    """[b, c, h, w], scaled down image by image to the norm that the last map may have."""
    size = noise_map.square().mean((1, 2, 3), keepdim=True).sqrt()
    return noise_map * (LARGEST / size.clamp(min=1e-12)).clamp(max=1)
