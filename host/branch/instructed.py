"""Guidance of models that are given an image beside the latent, in the channels that the host calls c_concat."""

from __future__ import annotations

import uuid
from typing import Protocol

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import Sampler
from torch import Tensor

from ..run.model import add_outermost
from ..run.refusals import OURS, check_beside, check_guided_alone, check_instructed
from .call import place

KEY = f"{OURS}Instruct Guidance"


class Rule(Protocol):
    """node: the display name of the node that made it. image_scale: at 1 there is nothing to move."""

    node: str
    image_scale: float

    def moved(self, estimate: Tensor, shown: Tensor, unshown: Tensor) -> Tensor:
        """An estimate [b, c, h, w] given the image, from those of no instruction with the image and without."""


def attach_instruction(model: ModelPatcher, image: Tensor, rule: Rule) -> ModelPatcher:
    """A clone of `model` to which every prompt shows the image latents [1 or b, c, h, w], guided by `rule`.

    Raises ValueError for models that take no image, or carry such a guidance already.
    """
    check_instructed(model, rule.node, KEY)
    model = model.clone()
    concat_cond = model.get_model_object("concat_cond")

    def shown(**kwargs) -> Tensor:
        beside = None if kwargs["prompt_type"] == KEY else image
        return concat_cond(**kwargs | {"concat_latent_image": beside})

    def outer_sample(executor, noise: Tensor, latent: Tensor, sampler: Sampler, sigmas: Tensor, *args, **kwargs):
        guider = executor.class_obj
        check_beside(rule.node, noise, image)
        check_guided_alone(rule.node, guider)
        negative = guider.conds.get("negative")
        if negative is None or rule.image_scale == 1:  # a run of one prompt, as an inversion's, has no guidance
            return executor(noise, latent, sampler, sigmas, *args, **kwargs)
        guider.conds[KEY] = [cond | {"uuid": uuid.uuid4(), "prompt_type": KEY} for cond in negative]
        try:
            guider.model_options["transformer_options"][KEY] = guider
            return executor(noise, latent, sampler, sigmas, *args, **kwargs)
        finally:
            del guider.conds[KEY]

    def calc_cond_batch(executor, base, conds: list, x: Tensor, timestep: Tensor, model_options: dict):
        guider = model_options["transformer_options"].get(KEY)
        prompts = () if guider is None else ("positive", "negative")
        found = {name: at for name in prompts if (at := place(conds, guider.conds[name])) is not None}
        if not found:
            return executor(base, conds, x, timestep, model_options)
        asked, at = list(conds), found.get("negative", len(conds))
        asked += [guider.conds["negative"]] * (at == len(conds))  # which the host leaves out at cfg 1
        *results, unshown = executor(base, [*asked, guider.conds[KEY]], x, timestep, model_options)
        shown = results[at]
        for number in found.values():
            results[number] = rule.moved(results[number], shown, unshown)
        return results[: len(conds)]

    model.add_object_patch("concat_cond", shown)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    # An edit's source branch has to see every row of the call.
    add_outermost(model, WrappersMP.CALC_COND_BATCH, KEY, calc_cond_batch)
    return model
