"""DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), whose step is the same towards the noise and towards the image.

With D the denoised estimate, the step from sigma_i to sigma_{i+1} is x' = (sigma_{i+1} / sigma_i) (x - D) + D, where D
is D_i + (D_i - D_{i-1}) / (2 r) and r the length in log sigma of the step before over that of this one. On falling
sigmas that is the host's `dpmpp_2m`; on rising ones it is its inverse to second order, at one evaluation a step too. It
is not exact: the way down evaluates at the other end of each step. Sampler space as in ddim.py. Pure torch.
"""

from __future__ import annotations

from math import log
from typing import NamedTuple

from torch import Tensor


class Evaluation(NamedTuple):
    """The denoised estimate [b, c, h, w] at a sigma."""

    sigma: float
    denoised: Tensor


def multistep(x: Tensor, now: Evaluation, sigma_next: float, before: Evaluation | None) -> Tensor:
    """x [b, c, h, w] taken from the sigma of `now`, its evaluation, to `sigma_next`; up or down, but neither is 0.

    before: the evaluation of the step before, of another sigma; without it the step is of first order, an Euler step.
    """
    sigma, denoised = now
    if before is not None:
        over_r = log(sigma_next / sigma) / log(sigma / before.sigma)
        denoised = denoised + over_r / 2 * (denoised - before.denoised)
    ratio = sigma_next / sigma
    return ratio * x + (1 - ratio) * denoised
