"""Negative prompts that come in or fade out over the run, in place of the unconditional prediction. Pure torch.

Plug-and-Play (arXiv 2211.12572, "Negative-prompting"): eps~ = alpha_t eps(empty) + (1 - alpha_t) eps(negative), and
guidance as ever, eps~ + cfg (eps(prompt) - eps~). Negative-prompt inversion (arXiv 2305.16807, section 3.2) is the case
alpha = 0 with the source's prompt as the negative: guidance then has no effect on the source.
"""

from __future__ import annotations

import math
from typing import NamedTuple

CONSTANT, LINEAR, EXPONENTIAL = "constant", "linear", "exponential"
SCHEDULES = (CONSTANT, LINEAR, EXPONENTIAL)


class Mixture(NamedTuple):
    """alpha: how much of the empty prompt there is at the start, 0 to 1. schedule: how it falls from there."""

    alpha: float
    schedule: str

    def at(self, step: int, steps: int) -> float:
        """alpha_t at a step: constant, falling to 0 at the last step in a line, or as exp(-6 u), u from 0 to 1."""
        u = step / max(steps - 1, 1)
        return self.alpha * {CONSTANT: 1.0, LINEAR: 1 - u, EXPONENTIAL: math.exp(-6 * u)}[self.schedule]


NPI = "negative-prompt inversion"
PRESETS = {
    "Plug-and-Play, real image": Mixture(1.0, LINEAR),
    "Plug-and-Play, generated image": Mixture(0.75, LINEAR),
    NPI: Mixture(0.0, CONSTANT),
}
