"""Ways into the host's attention layers for one model call, around whatever other packs have put there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from comfy.ldm.modules.attention import SpatialTransformer, optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from ..layer import Inputs, Layer
from .tree import blocks_with

Enter = Callable[[str, Inputs, dict], Inputs]
"""Takes "self" or "cross", the inputs of all rows of a layer and its options; returns the inputs to go on with."""

Leave = Callable[[Tensor, dict], Tensor]
"""Takes a layer's output [rows, positions, channels] and the options that `Enter` got; returns the output."""

Measure = Callable[[Tensor, Tensor, dict], None]
"""Takes the projected queries and keys [rows, positions or tokens, heads * d] of a cross-attention, and its options."""

Attend = Callable[[Tensor, Tensor, Tensor, dict], Tensor]
"""Takes the projected queries, keys and values [rows, positions or tokens, heads * d] of a layer, and its options;
returns its attention [rows, positions, heads * d]."""

Change = Callable[[Tensor, dict], Tensor]
"""Takes features [rows, channels, h, w] and the call's options; returns the features to go on with."""


def layer_of(kind: str, extra_options: dict) -> Layer:
    return Layer(kind, *extra_options["block"], extra_options["block_index"], *extra_options["activations_shape"][2:])


def with_enter(options: dict, enter: Enter, leave: Leave | None = None) -> dict:
    """Transformer options whose attention layers pass through `enter` first and through `leave` last.

    Other packs' patches lie between them: some tile or merge positions, and see the rows that `enter` has made.
    """

    def entering(kind: str) -> Callable:
        return lambda query, key, value, extra: enter(kind, Inputs(query, key, value), extra)

    patches = dict(options.get("patches", {}))
    for name, kind in (("attn1", "self"), ("attn2", "cross")):
        patches[f"{name}_patch"] = [entering(kind), *patches.get(f"{name}_patch", [])]
        if leave is not None:
            patches[f"{name}_output_patch"] = [*patches.get(f"{name}_output_patch", []), leave]
    return {**options, "patches": patches}


def with_measure(options: dict, measure: Measure, unet: UNetModel) -> dict:
    """Transformer options whose cross-attention layers show their queries and keys, and attend as they did before."""

    def measuring(inner: Attend, query: Tensor, key: Tensor, value: Tensor, extra: dict) -> Tensor:
        measure(query, key, extra)
        return inner(query, key, value, extra)

    return with_attend(options, "cross", measuring, unet)


def with_decoded(options: dict, block: int, change: Change) -> dict:
    """Transformer options whose features before output block `block`, without the skip that joins them there, pass
    through `change`, after other packs' patches. Before block 0 they are the middle block's output.
    """

    def changed(features: Tensor, skip: Tensor, extra: dict) -> tuple[Tensor, Tensor]:
        return (change(features, extra) if extra["block"] == ("output", block) else features), skip

    name, patches = "output_block_patch", options.get("patches", {})
    return {**options, "patches": {**patches, name: [*patches.get(name, []), changed]}}


def with_attend(options: dict, kind: str, attend: Callable, unet: UNetModel) -> dict:
    """Transformer options whose "self" or "cross" attention layers attend by `attend`.

    It gets the `Attend` that was there before, another pack's or the host's own, and what that takes.
    """
    name = {"self": "attn1", "cross": "attn2"}[kind]
    replaced = options.get("patches_replace", {})
    inner = replaced.get(name, {})
    places = {*blocks_with(unet, SpatialTransformer), *inner}
    around = {place: partial(attend, inner.get(place, host_attention)) for place in places}
    return {**options, "patches_replace": {**replaced, name: around}}


def host_attention(query: Tensor, key: Tensor, value: Tensor, extra: dict) -> Tensor:
    """An `Attend`: what the host does where no pack has replaced it."""
    heads, precision = extra["n_heads"], extra["attn_precision"]
    return optimized_attention(query, key, value, heads, attn_precision=precision, transformer_options=extra)
