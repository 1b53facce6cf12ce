"""A change to how guidance combines two predictions, through the host's lists for it."""

from __future__ import annotations

from typing import Protocol

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .refusals import check_same_model
from .schedule import step_of
from .trajectory import Trajectory

KEY = "palimpsest.guided"


class Rule(Protocol):
    def shrunk(self, difference: Tensor) -> Tensor:
        """What guidance multiplies, instead of the positive's denoised estimate less the negative's [b, c, h, w]."""

    def pulled(self, denoised: Tensor, source: Tensor, shrunk: Tensor) -> Tensor:
        """The denoised estimate to go on with, given the source's image [1 or b, c, h, w]."""

    def pulls(self, fraction: float) -> bool:
        """Whether `pulled` applies where `fraction` (0 to 1) of the schedule is finished."""


def attach_rule(model: ModelPatcher, rule: Rule, trajectory: Trajectory | None) -> ModelPatcher:
    """A clone of `model` that is guided by `rule`; without a trajectory nothing is pulled.

    At cfg 1 there is no difference to shrink. Raises ValueError where the trajectory is another model's, or the model
    has such a rule already.
    """
    if KEY in model.wrappers.get(WrappersMP.PREDICT_NOISE, {}):
        raise ValueError("This MODEL already carries a Proximal Guidance: one is enough, raise its quantile.")
    if trajectory is not None:
        check_same_model(model, trajectory)

    def outer_sample(executor, *args, **kwargs):
        executor.class_obj.model_options["transformer_options"][KEY] = []  # in the host's copy for this run alone
        return executor(*args, **kwargs)

    def predict_noise(executor, x: Tensor, timestep: Tensor, model_options: dict, *args, **kwargs):
        result = executor(x, timestep, model_options, *args, **kwargs)
        # A cache may leave out any call but the first.
        if not model_options["transformer_options"][KEY]:
            raise ValueError(
                f"Proximal Guidance has no effect in the guider {type(executor.class_obj).__name__}, which combines "
                "predictions by itself: use CFGGuider or a KSampler."
            )
        return result

    def before(args: dict) -> list[Tensor]:
        args["model_options"]["transformer_options"][KEY].append(True)
        positive, negative, *others = args["conds_out"]
        if args["conds"][1] is None:
            return args["conds_out"]
        return [negative + rule.shrunk(positive - negative), negative, *others]

    def after(args: dict) -> Tensor:
        denoised, steps = args["denoised"], trajectory.steps
        if args["uncond"] is None or not rule.pulls(step_of(trajectory.sigmas, float(args["sigma"][0])) / steps):
            return denoised
        source = trajectory.states[-1].to(denoised)
        if source.shape[1:] != denoised.shape[1:] or len(source) not in (1, len(denoised)):
            raise ValueError(
                f"Proximal Guidance got a trajectory of shape {list(source.shape)} but the sampler's latent is "
                f"{list(denoised.shape)}: connect the trajectory of this edit."
            )
        return rule.pulled(denoised, source, args["cond_denoised"] - args["uncond_denoised"])

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, predict_noise)
    model.set_model_sampler_pre_cfg_function(before)
    if trajectory is not None:
        model.set_model_sampler_post_cfg_function(after)
    return model
