"""A second negative prompt: its prediction is mixed into the sampler's own negative one in every model call."""

from __future__ import annotations

from typing import Protocol

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.sampler_helpers import convert_cond
from comfy.samplers import Sampler
from torch import Tensor

from ..files.trajectory import Trajectory
from ..run.model import add_outermost
from ..run.refusals import NEGATIVES as KEY
from ..run.refusals import (
    check_plain,
    check_same_model,
    check_source,
    check_whole_schedule,
    check_without_values,
    is_mixed,
)
from ..run.sampler import OwnSampler
from ..run.schedule import step_of
from .call import place


class Share(Protocol):
    def at(self, step: int, steps: int) -> float:
        """How much of the empty prompt there is at a step, 0 to 1."""


def attach_mixture(
    model: ModelPatcher, empty: list, share: Share, trajectory: Trajectory | None = None
) -> ModelPatcher:
    """A clone of `model` whose negative prediction is mixed with that of the conditioning `empty`.

    Where the share is 0 or 1 only one of them is run. With a trajectory its prompt takes the place of the sampler's
    negative, and its schedule is that of the shares. Raises ValueError where the model carries a mixture already, or
    the trajectory is another model's.
    """
    if is_mixed(model):
        raise ValueError("This MODEL already carries a Negative Prompt Guidance: one is enough, remove the other.")
    if trajectory is not None:
        check_same_model(model, trajectory)
        check_source(trajectory.conditioning)
        check_without_values(trajectory, "Negative Prompt Guidance")

    def outer_sample(executor, noise: Tensor, latent_image: Tensor, sampler: Sampler, sigmas: Tensor, *args, **kwargs):
        guider = executor.class_obj
        if "negative" not in guider.conds:
            raise ValueError(
                f"Negative Prompt Guidance needs a negative to mix with, but the guider {type(guider).__name__} has "
                "none: use CFGGuider or a KSampler."
            )
        check_plain(empty, "The empty prompt of Negative Prompt Guidance", guider.conds["negative"][0]["cross_attn"])
        if trajectory is None and share.at(0, 3) != share.at(1, 3) and not isinstance(sampler, OwnSampler):
            check_whole_schedule(sigmas, bool(noise.any()), guider.model_patcher)
        if trajectory is not None:
            guider.conds["negative"] = convert_cond(trajectory.conditioning)
        guider.conds[KEY] = convert_cond(empty)
        guider.model_options["transformer_options"][KEY] = guider  # the host's copy for this run alone
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def calc_cond_batch(executor, base, conds: list, x: Tensor, timestep: Tensor, model_options: dict):
        options = model_options["transformer_options"]
        guider = options.get(KEY)
        at = guider and place(conds, guider.conds["negative"])
        if at is None:
            return executor(base, conds, x, timestep, model_options)
        sigmas = options["sample_sigmas"] if trajectory is None else trajectory.sigmas
        part = share.at(step_of(sigmas, float(timestep[0])), len(sigmas) - 1)
        other = guider.conds[KEY]
        if part == 0:
            return executor(base, conds, x, timestep, model_options)
        if part == 1:
            return executor(base, [*conds[:at], other, *conds[at + 1 :]], x, timestep, model_options)
        *results, mixed = executor(base, [*conds, other], x, timestep, model_options)
        results[at] = torch.lerp(results[at], mixed, part)
        return results

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    # An edit's source branch has to see every row of the call.
    add_outermost(model, WrappersMP.CALC_COND_BATCH, KEY, calc_cond_batch)
    return model
