"""Where in a schedule a model call stands. Pure torch."""

from __future__ import annotations

from torch import Tensor


def step_of(sigmas: Tensor, sigma: float) -> int:
    """The step of falling sigmas [n + 1] that `sigma` belongs to, 0 to n - 1: the one that it starts or lies within."""
    return min(int((sigmas[:-1] > sigma * (1 + 1e-4)).sum()), len(sigmas) - 2)


def fraction_of(sigmas: Tensor, sigma: float) -> float:
    """How much of the schedule (0 to 1) is finished where the step of `sigma` starts."""
    return step_of(sigmas, sigma) / (len(sigmas) - 1)
