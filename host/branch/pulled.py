"""A pull of the denoised estimate to an image, whatever guider, sampler and edit it comes from."""

from __future__ import annotations

from typing import Protocol

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import Sampler
from torch import Tensor

from ..run.model import add_outermost
from ..run.refusals import OURS, check_pulled
from ..run.schedule import fraction_of
from . import virtual

KEY = f"{OURS}Image Pull"


class Pull(Protocol):
    def pulled(self, denoised: Tensor, image: Tensor, fraction: float) -> Tensor:
        """The estimate [b, c, (t,) h, w] to go on with, at the step that starts at `fraction` (0 to 1) of the run."""


def attach_pull(model: ModelPatcher, image: Tensor, pull: Pull) -> ModelPatcher:
    """A clone of `model` whose guided estimate is pulled to `image` [1 or b, c, (t,) h, w], in sampler space.

    Several pulls act one after the other.
    """

    def outer_sample(executor, noise: Tensor, latent: Tensor, sampler: Sampler, *args, **kwargs):
        options = executor.class_obj.model_options["transformer_options"]
        check_pulled(noise, image, virtual.KEY in options)
        return executor(noise, latent, sampler, *args, **kwargs)

    def predict_noise(executor, x: Tensor, timestep: Tensor, model_options: dict, *args, **kwargs) -> Tensor:
        denoised = executor(x, timestep, model_options, *args, **kwargs)
        fraction = fraction_of(model_options["transformer_options"]["sample_sigmas"], float(timestep[0]))
        return pull.pulled(denoised, image.to(denoised), fraction)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    add_outermost(model, WrappersMP.PREDICT_NOISE, KEY, predict_noise)
    return model
