"""Guidance by concepts: prompts beside the sampler's own, whose part is added to what its guidance comes to."""

from __future__ import annotations

from typing import Protocol

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.sampler_helpers import convert_cond
from comfy.samplers import CFGGuider, Sampler, calc_cond_batch
from torch import Tensor

from ..run.refusals import OURS, check_every_call, check_plain, check_positions_kept, check_prompt_kept, check_unet
from ..run.schedule import fraction_of
from ..run.shortcuts import uncompiled
from ..unet.patches import layer_of, with_measure
from .call import CHUNKS, POSITIVE, slice_of
from .maps import map_size, token_maps

KEY = f"{OURS}Concept Guidance"


class Concept(Protocol):
    """node: the display name of the node that made it. conditioning, empty: of the concept and of no prompt.

    columns: [tokens], 1 at the concept's words.
    """

    node: str
    conditioning: list
    empty: list
    columns: Tensor

    def applies(self, fraction: float) -> bool:
        """Whether it has a part where `fraction` (0 to 1) of the schedule is finished."""

    def guided(self, difference: Tensor, attended: Tensor) -> Tensor:
        """What is added to the denoised estimate [b, c, h, w]: from the concept's estimate less that of no prompt, and
        from the map of its words [b, h, w].
        """


def attach_concept(model: ModelPatcher, concept: Concept) -> ModelPatcher:
    """A clone of `model` that is guided by `concept` too. Raises ValueError for other models than UNets."""
    check_unet(model, concept.node)
    model = model.clone()
    options = model.model_options["transformer_options"]
    if KEY not in options:
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)
    options[KEY] = (*options.get(KEY, ()), concept)
    return model


def _outer_sample(executor, noise: Tensor, latent: Tensor, sampler: Sampler, sigmas: Tensor, *args, **kwargs):
    guider = executor.class_obj
    concepts = guider.model_options["transformer_options"][KEY]
    check_every_call(guider.model_patcher, concepts[0].node)
    like = guider.conds["positive"][0]["cross_attn"]
    names = [(f"{KEY}.{i}", f"{KEY}.{i}.empty") for i in range(len(concepts))]
    for concept, (own, empty) in zip(concepts, names, strict=True):
        check_plain(concept.conditioning, f"The concept of {concept.node}", like)
        guider.conds[own], guider.conds[empty] = convert_cond(concept.conditioning), convert_cond(concept.empty)
    try:
        return executor(noise, latent, sampler, sigmas, *args, **kwargs)
    finally:
        for name in [name for pair in names for name in pair]:
            del guider.conds[name]


def _predict_noise(executor, x: Tensor, timestep: Tensor, model_options: dict, *args, **kwargs) -> Tensor:
    denoised = executor(x, timestep, model_options, *args, **kwargs)  # other wrappers may move x itself
    options = model_options["transformer_options"]
    fraction = fraction_of(options["sample_sigmas"], float(timestep[0]))
    for i, concept in enumerate(options[KEY]):
        if concept.applies(fraction):
            denoised = denoised + _part(executor.class_obj, i, concept, x, timestep, model_options)
    return denoised


def _part(guider: CFGGuider, i: int, concept: Concept, x: Tensor, timestep: Tensor, model_options: dict) -> Tensor:
    maps: list[Tensor] = []
    size = map_size(tuple(x.shape[2:]))

    def see(query: Tensor, key: Tensor, extra: dict) -> None:
        layer = layer_of("cross", extra)
        chunks = extra.get(CHUNKS, extra["cond_or_uncond"])
        if (layer.height, layer.width) != size or POSITIVE not in chunks:
            return
        check_positions_kept(query.shape[1], layer.positions)
        check_prompt_kept(key.shape[1], len(concept.columns))
        rows = slice_of(query, chunks, chunks.index(POSITIVE))
        found = token_maps(query[rows], key[rows], extra["n_heads"], len(concept.columns))
        maps.append((found @ concept.columns.to(found)).unflatten(1, size))

    model = guider.inner_model
    options = with_measure(uncompiled(model_options["transformer_options"]), see, model.diffusion_model)
    conds = [guider.conds[f"{KEY}.{i}"], guider.conds[f"{KEY}.{i}.empty"]]
    own, empty = calc_cond_batch(model, conds, x, timestep, {**model_options, "transformer_options": options})
    if not maps:
        raise ValueError(
            f"{concept.node} finds no cross-attention of {size[0]} x {size[1]} positions in this MODEL to locate its "
            "words by: use a larger image."
        )
    return concept.guided(own - empty, torch.stack(maps).mean(0))
