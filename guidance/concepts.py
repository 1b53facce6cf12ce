"""Concepts added to or taken from an image, each where it belongs (LEDITS++, arXiv 2311.16711).

Over whatever the sampler's own guidance says, every concept adds s M (e(concept) - e(empty)), with a minus for one that
is to go. M is the product of two masks of each image: M1, where the concept's words are attended to, the sum of their
maps smoothed by a 3 x 3 Gaussian, and M2, where the two predictions differ, the sum over channels. Both are 1 where the
value reaches the quantile lambda. Differences of denoised estimates do for those of noise, to which they are
proportional. The authors guide by concepts alone, along edit-friendly noise maps of an empty prompt. Pure torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

NODE = "Concept Guidance"
SPREAD = 0.5  # of the Gaussian, in positions


@dataclass(frozen=True)
class Concept:
    """conditioning, empty: the host's, of the concept and of no prompt. columns: [tokens], 1 at the concept's words.

    scale: s, negative for a concept that is to go. From fraction `start` of the run until `end`. quantile: lambda.
    """

    conditioning: list
    empty: list
    columns: Tensor
    scale: float
    start: float
    end: float
    quantile: float

    node = NODE

    def applies(self, fraction: float) -> bool:
        return self.start <= fraction < self.end

    def guided(self, difference: Tensor, attended: Tensor) -> Tensor:
        """What is added to the denoised estimate, from the difference of the two [b, c, h, w] and the map [b, h, w]."""
        return self.scale * self.mask(difference, attended) * difference

    def mask(self, difference: Tensor, attended: Tensor) -> Tensor:
        """[b, 1, h, w] of 0 and 1."""
        words = interpolate(smoothed(attended)[:, None], difference.shape[2:], mode="nearest")
        differs = difference.float().abs().sum(1, keepdim=True)
        return (reaches(words, self.quantile) * reaches(differs, self.quantile)).to(difference)


def smoothed(maps: Tensor) -> Tensor:
    """[b, h, w] by a 3 x 3 Gaussian, mirrored at the edges."""
    side = math.exp(-1 / (2 * SPREAD**2))
    line = maps.new_tensor([side, 1.0, side])
    kernel = line[:, None] * line / line.sum() ** 2
    return conv2d(pad(maps[:, None], (1, 1, 1, 1), mode="reflect"), kernel[None, None])[:, 0]


def reaches(values: Tensor, quantile: float) -> Tensor:
    """[b, 1, h, w]: 1 where a value is no less than each image's quantile, 0 elsewhere."""
    least = values.flatten(1).quantile(quantile, 1)
    return (values >= least.view(-1, 1, 1, 1)).to(torch.float32)
