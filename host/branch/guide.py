"""Guidance by attention: before a step, a gradient through the UNet moves the sampler's own latent.

Source and target run alone, one after the other, as the MODEL runs them without the pack's edits: the source at the
trajectory's state and without a gradient, the target at the sampler's latent. With two latents the negative prompt does
the same, as its own source, and the target's part of the sampler's call runs where the target was moved to.
"""

from __future__ import annotations

from typing import Protocol

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider, Sampler
from torch import Tensor

from ..files.trajectory import Trajectory
from ..layer import Layer
from ..run.alone import Conds, alone, mixes_prompts
from ..run.model import add_outermost
from ..run.refusals import (
    check_attention,
    check_in_place,
    check_negative_runs,
    check_one_state,
    check_positions_kept,
    check_prompt_kept,
    check_same_length,
    check_states_known,
    check_two_latents,
    check_unet,
    check_unmixed,
    check_without_values,
)
from ..run.shortcuts import decided_once, uncached, uncompiled
from ..unet.gradients import constant_control, differentiable, gradients, isolated, refusing
from ..unet.patches import Measure, layer_of, with_measure
from . import guided, source
from .call import NEGATIVE, POSITIVE, estimate, place
from .maps import attention_maps

KEY = f"{source.KEY}.guide"
AHEAD = f"{KEY}.ahead"  # from the sampler's latent to the target's, in a model call


class Guide(Protocol):
    """What a latent is moved by.

    two_latents: whether the target moves to a latent of its own, and the sampler's is moved by the negative prompt.
    """

    two_latents: bool

    def applies(self, fraction: float) -> bool:
        """Whether the latent moves where `fraction` (0 to 1) of the schedule is finished."""

    def wants(self, layer: Layer) -> bool:
        """Whether the maps of this cross-attention layer count."""

    def loss(self, maps: Tensor, reference: Tensor) -> Tensor:
        """[b]: one layer's part of the loss, from the target's maps [b, heads, positions, tokens] and the source's."""

    def moved(self, x: Tensor, gradient: Tensor, sigma: float) -> Tensor:
        """x after its step, given the gradient of the loss."""


def attach_guide(model: ModelPatcher, trajectory: Trajectory, guide: Guide, checkpointing: bool) -> ModelPatcher:
    """A clone of `model` whose latent `guide` moves. Raises ValueError as `source.attach`."""
    check_unet(model, "Cross Attention Guidance")
    check_without_values(trajectory, "Cross Attention Guidance")
    model, branch = source.branched(model, trajectory)
    check_states_known(branch.virtual, "Cross Attention Guidance")
    if KEY in model.model_options["transformer_options"]:
        raise ValueError("This MODEL already carries a Cross Attention Guidance: one has to do, with a larger amount.")
    model = differentiable(model, checkpointing)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
    # Local Blend has the last word, Proximal Guidance the first: what it moves is the end of the step before.
    add_outermost(model, WrappersMP.PREDICT_NOISE, KEY, _predict_noise, within=guided.KEY)
    add_outermost(model, WrappersMP.CALC_COND_BATCH, KEY, _calc_cond_batch)  # the source joins the target's call
    model.model_options["transformer_options"] |= {source.KEY: branch, KEY: guide}
    return model


def _outer_sample(executor, noise: Tensor, latent_image: Tensor, sampler: Sampler, *args, **kwargs):
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]  # the host's copy for this run alone
    check_in_place(sampler, "Cross Attention Guidance")
    check_attention(guider.model_patcher, "Cross Attention Guidance")
    ((embedding, _),) = options[source.KEY].trajectory.conditioning
    positive = guider.conds["positive"][0]
    check_same_length(embedding.shape[1], positive["cross_attn"].shape[1])
    if "gligen" in positive:
        raise ValueError("Cross Attention Guidance cannot work through GLIGEN: remove it from the target prompt.")
    if options[KEY].two_latents:
        check_two_latents(guider)
        decided_once(options)
    return executor(noise, latent_image, sampler, *args, **kwargs)


def _predict_noise(executor, x: Tensor, timestep: Tensor, model_options: dict, *args, **kwargs):
    options = model_options["transformer_options"]
    run, guide, sigma = options[source.RUN], options[KEY], float(timestep[0])
    trajectory = run.branch.trajectory
    index = trajectory.index(sigma)
    if index is not None and guide.applies(index / trajectory.steps):
        if source.STATE in options:
            check_one_state(["Cross Attention Guidance"])
        guider, state = executor.class_obj, run.state(x, index)

        def moved(at: int, cond: dict, source_cond: dict) -> Tensor:
            gradient = _gradient(guider, guide, at, (cond, source_cond), (x, state), timestep, model_options)
            return guide.moved(x, gradient, sigma)

        own = target = moved(POSITIVE, guider.conds["positive"][0], run.source)
        if guide.two_latents:
            (negative,) = guider.conds["negative"]
            own = moved(NEGATIVE, negative, negative)
            model_options = {**model_options, "transformer_options": {**options, AHEAD: target - own}}
        x.copy_(own)  # in place: the step that the sampler takes starts here
    return executor(x, timestep, model_options, *args, **kwargs)


def _calc_cond_batch(executor, model, conds: list, x: Tensor, timestep: Tensor, model_options: dict):
    """Runs the target at its own latent, and tells its estimate as seen from the sampler's: with the same noise."""
    options = model_options["transformer_options"]
    ahead = options.get(AHEAD)
    guider = options[source.RUN].guider if ahead is not None else None
    at = guider and place(conds, guider.conds["positive"])
    if at is None:
        return executor(model, conds, x, timestep, model_options)
    check_negative_runs(guider)
    if float(timestep[0]) == float(options["sample_sigmas"][0]):

        def ask(conds: Conds) -> list[Tensor]:
            return executor(model, conds, x, timestep, model_options)

        mixed = mixes_prompts(ask, conds, at, x, ask(conds)[at])
        check_unmixed(mixed, "Cross Attention Guidance with two latents runs the target's alone: set latents to one")
    others = [cond if i != at else None for i, cond in enumerate(conds)]
    results = executor(model, others, x, timestep, model_options)
    results[at] = executor(model, alone(conds, at), x + ahead, timestep, model_options)[at] - ahead
    return results


def _gradient(
    guider: CFGGuider,
    guide: Guide,
    at: int,
    conds: tuple[dict, dict],
    latents: tuple[Tensor, Tensor],
    timestep: Tensor,
    model_options: dict,
) -> Tensor:
    """Of the summed losses of all images, whose parts do not touch: each image gets its own.

    at: the cond index of both prompts. conds, latents: what is moved, and the source that it is compared with.
    """
    reference: dict[Layer, Tensor] = {}
    losses: dict[Layer, Tensor] = {}  # by layer: a checkpointed one is measured again for its gradient
    (cond, source_cond), (x, state) = conds, latents

    def see(maps: Tensor, layer: Layer) -> None:
        reference[layer] = maps

    def compare(maps: Tensor, layer: Layer) -> None:
        losses[layer] = guide.loss(maps, reference[layer])

    def run_alone(cond: dict, x: Tensor, take) -> None:
        tokens = cond["cross_attn"].shape[1]
        measure = _measure(guide, tokens, take)
        own = {name: value for name, value in model_options["transformer_options"].items() if name != source.RUN}
        options = with_measure(uncached(uncompiled(isolated(own))), measure, guider.inner_model.diffusion_model)
        sigmas = timestep[: len(x)].clone()
        estimate(guider.inner_model, at, cond, x, sigmas, {**model_options, "transformer_options": options})

    with gradients(), refusing("Cross Attention Guidance"):
        with torch.no_grad():
            run_alone(source_cond, state.clone(), see)
        if not reference:
            raise ValueError(
                "Cross Attention Guidance finds no cross-attention that is small enough in this MODEL: raise max_side."
            )
        leaf = x.clone().requires_grad_()
        run_alone(constant_control(cond), leaf, compare)
        return torch.autograd.grad(sum(losses.values()).sum(), leaf)[0]


def _measure(guide: Guide, tokens: int, take) -> Measure:
    def measure(query: Tensor, key: Tensor, extra_options: dict) -> None:
        layer = layer_of("cross", extra_options)
        if guide.wants(layer):
            check_positions_kept(query.shape[1], layer.positions)
            check_prompt_kept(key.shape[1], tokens)
            take(attention_maps(query, key, extra_options["n_heads"], tokens), layer)

    return measure
