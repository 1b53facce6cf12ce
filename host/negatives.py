"""A second negative prompt: its prediction is mixed into the sampler's own negative one in every model call."""

from __future__ import annotations

from typing import Protocol

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.sampler_helpers import convert_cond
from comfy.samplers import CFGGuider
from torch import Tensor

KEY = "palimpsest.negatives"


class Mixture(Protocol):
    def at(self, step: int, steps: int) -> float:
        """The share of the second prompt at a step, 0 to 1."""


def attach_mixture(model: ModelPatcher, second: list, mixture: Mixture, first: list | None = None) -> ModelPatcher:
    """A clone of `model` whose negative prediction is mixed with that of the conditioning `second`.

    Where the share is 0 or 1 only one of them is run. `first` takes the place of the sampler's negative. Raises
    ValueError where the model carries a mixture already.
    """
    if KEY in model.wrappers.get(WrappersMP.CALC_COND_BATCH, {}):
        raise ValueError("This MODEL already carries a Negative Prompt Guidance: one is enough, remove the other.")

    def outer_sample(executor, *args, **kwargs):
        guider = executor.class_obj
        if "negative" not in guider.conds:
            raise ValueError(
                f"Negative Prompt Guidance needs a negative to mix with, but the guider {type(guider).__name__} has "
                "none: use CFGGuider or a KSampler."
            )
        if first is not None:
            guider.conds["negative"] = convert_cond(first)
        guider.conds[KEY] = convert_cond(second)
        options = guider.model_options["transformer_options"]  # the host's copy for this run alone
        options[KEY] = guider
        try:
            return executor(*args, **kwargs)
        finally:
            del options[KEY], guider.conds[KEY]

    def calc_cond_batch(executor, base, conds: list, x: Tensor, timestep: Tensor, model_options: dict):
        options = model_options["transformer_options"]
        at = _negative(options.get(KEY), conds)
        if at is None:
            return executor(base, conds, x, timestep, model_options)
        sigmas = options["sample_sigmas"]
        step = int((sigmas[:-1] > float(timestep[0]) * (1 + 1e-4)).sum())
        share, other = mixture.at(step, len(sigmas) - 1), options[KEY].conds[KEY]
        if share == 0:
            return executor(base, conds, x, timestep, model_options)
        if share == 1:
            return executor(base, [*conds[:at], other, *conds[at + 1 :]], x, timestep, model_options)
        *results, mixed = executor(base, [*conds, other], x, timestep, model_options)
        results[at] = torch.lerp(results[at], mixed, share)
        return results

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, calc_cond_batch)
    # Outermost: an edit's source branch has to see every row of the call.
    wrappers = model.wrappers[WrappersMP.CALC_COND_BATCH]
    model.wrappers[WrappersMP.CALC_COND_BATCH] = {KEY: wrappers.pop(KEY), **wrappers}
    return model


def _negative(guider: CFGGuider | None, conds: list[list[dict] | None]) -> int | None:
    """Which of the conditionings of a call is the guider's negative, if any."""
    if guider is None:
        return None
    negatives = {cond["uuid"] for cond in guider.conds["negative"]}
    return next((i for i, cond in enumerate(conds) if cond and cond[0]["uuid"] in negatives), None)
