"""Conditionings that change from step to step, in the host's own terms: an entry for each step, limited to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

Percent = Callable[[float], float]
"""The host's `percent_to_sigma`: falls from the noise at 0 to the image at 1."""


def timed(embeddings: Tensor, options: dict, sigmas: Tensor, percent_to_sigma: Percent) -> list:
    """A CONDITIONING of which embeddings[i] [b, tokens, channels] alone is active at sigmas[i].

    sigmas: [n + 1] falling; options: what all entries carry besides.
    """
    levels = sigmas[:-1].tolist()
    # The host tells an entry's range in per cent. Half way, by ratio, rounding can move no sigma out of its range.
    bounds = [_percent(math.sqrt(sigma * below), percent_to_sigma) for sigma, below in pairwise(levels)]
    return [
        [embedding, {**options, "start_percent": start, "end_percent": end}]
        for embedding, (start, end) in zip(embeddings, pairwise([0.0, *bounds, 1.0]), strict=True)
    ]


def _percent(sigma: float, percent_to_sigma: Percent) -> float:
    """Where the host's schedule has `sigma`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if percent_to_sigma(middle) > sigma else (low, middle)
    return (low + high) / 2
