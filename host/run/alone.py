"""Whether the model repeats its answers, and whether one prompt's depends on the others in its call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Conds = Sequence[Sequence[dict] | None]
Ask = Callable[[Conds], list[Tensor]]
"""What the model answers to the conditionings of a call: denoised estimates [b, c, h, w]."""

ALIKE = 1e-3  # of the noise; answers of calls that have the same shapes are the same to the bit, or nearly so


def apart(x: Tensor, one: Tensor, other: Tensor) -> float:
    """How far two denoised estimates of x differ, as a share of the noise that they find in it."""
    return float((one - other).norm() / (x - one).norm())


def alone(conds: Conds, at: int) -> Conds:
    """The conditionings of a call that runs one of them only."""
    return [cond if i == at else None for i, cond in enumerate(conds)]


def mixes_prompts(ask: Ask, conds: Conds, at: int, x: Tensor, answer: Tensor) -> bool:
    """Whether the model's `answer` to conds[at] at x is another where the prompts beside it are others.

    A model that draws at random does not count: it answers otherwise to the same prompts too.
    """
    others = [cond if i == at else cond and [_changed(entry) for entry in cond] for i, cond in enumerate(conds)]
    return apart(x, answer, ask(others)[at]) > ALIKE >= apart(x, answer, ask(conds)[at])


def _changed(entry: dict) -> dict:
    """A prompt of the same shape."""
    crossattn = entry["model_conds"]["c_crossattn"]
    return {**entry, "model_conds": {**entry["model_conds"], "c_crossattn": type(crossattn)(crossattn.cond.flip(-1))}}
