"""What the host's flow transformers look like inside, and a way into their attention for one model call.

An architecture is one line of `ARCHITECTURES`. In each main block of all of them the first attention is the one of the
image's tokens, alone or joined with the text's; an override of the host's attention reaches it, and hooks on the blocks
tell which of them it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.math import rope
from comfy.ldm.flux.model import Flux
from comfy.ldm.hidream.model import HiDreamImageTransformer2DModel
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel
from torch import Tensor, nn

from .layer import Block, Layer

OVERRIDE = "optimized_attention_override"


class Architecture(NamedTuple):
    """blocks: attributes of the model that hold its main blocks, in the order they run in, and what to call them.
    image_first: whether the image's tokens come before the text's; they come after it, but for reference images.
    turned: whether image positions begin after the text, so that keys of a prompt of another length have to be turned.
    """

    blocks: dict[str, str]
    image_first: bool = False
    turned: bool = False


STREAMS = {"double_blocks": "double", "single_blocks": "single"}
ARCHITECTURES: dict[type[nn.Module], Architecture] = {
    Flux: Architecture(STREAMS),
    Chroma: Architecture(STREAMS),
    OpenAISignatureMMDITWrapper: Architecture({"joint_blocks": "block"}),
    QwenImageTransformer2DModel: Architecture({"transformer_blocks": "block"}),
    NextDiT: Architecture({"layers": "block"}, turned=True),
    WanModel: Architecture({"blocks": "block"}, image_first=True),
    HiDreamImageTransformer2DModel: Architecture(
        {"double_stream_blocks": "double", "single_stream_blocks": "single"}, image_first=True
    ),
}


class Joint(NamedTuple):
    """One attention of image and text tokens.

    layer: its place, with the size of its image. where: the image's tokens among all.
    split: whether tensors are [rows, heads, tokens, d], else [rows, tokens, heads * d] or [rows, tokens, heads, d].
    masked: whether some tokens are left out, by a mask that fits their number.
    """

    layer: Layer
    where: slice
    split: bool
    masked: bool

    def image(self, tensor: Tensor) -> Tensor:
        """The image's tokens of queries, keys or values: a view [rows, image tokens, ...]."""
        return (tensor.transpose(1, 2) if self.split else tensor)[:, self.where]

    def with_image(self, tensor: Tensor, image: Tensor) -> Tensor:
        """`tensor` with image tokens more or fewer than its own."""
        tokens = tensor.transpose(1, 2) if self.split else tensor
        joined = torch.cat([tokens[:, : self.where.start], image, tokens[:, self.where.stop :]], 1)
        return joined.transpose(1, 2) if self.split else joined


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The attention of queries, keys and values as the model has them: [rows, tokens, heads * d]."""

Enter = Callable[[Joint, Attend, tuple[Tensor, Tensor, Tensor], dict], Tensor]
"""Takes an attention, what to go on with, its queries, keys and values, and its options; returns what that returns."""


def architecture_of(model: nn.Module) -> Architecture | None:
    """Of exactly this class: what a kind of its own does inside is not known."""
    return ARCHITECTURES.get(type(model))


def dit_blocks(model: nn.Module) -> list[Block]:
    """The main blocks in the order that they run in: ("double", 0), ..., ("single", 37)."""
    blocks = ARCHITECTURES[type(model)].blocks
    return [(name, number) for held, name in blocks.items() for number in range(len(getattr(model, held)))]


def grid(model: nn.Module, latent: Tensor) -> tuple[int, int]:
    """Height and width of the image in tokens, for its latent [b, c, (t,) h, w]; frames stand below each other."""
    patch = model.patch_size if isinstance(model.patch_size, tuple) else (1, model.patch_size, model.patch_size)
    time, height, width = (math.ceil(size / by) for size, by in zip((1, *latent.shape[2:])[-3:], patch, strict=True))
    return time * height, width


@contextmanager
def joint_attention(model: nn.Module, latent: Tensor, options: dict, enter: Enter) -> Iterator[dict]:
    """Transformer options by which every attention of the image passes through `enter`, around another pack's override.

    latent: [rows, c, (t,) h, w], what the model is called on.
    """
    architecture, inner = ARCHITECTURES[type(model)], options.get(OVERRIDE)
    height, width = grid(model, latent)
    multiple = getattr(model, "pad_tokens_multiple", None) or 1
    padded = math.ceil(height * width / multiple) * multiple
    block: Block | None = None  # whose attention has still to come

    def override(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, **kwargs) -> Tensor:
        nonlocal block
        host = func if inner is None else partial(inner, func)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return host(q, k, v, heads, *args, **kwargs)

        if block is None:
            return attend(q, k, v)
        layer, split = Layer("self", *block, 0, height, width), kwargs.get("skip_reshape", False)
        block = None
        references = sum(kwargs["transformer_options"].get("reference_image_num_tokens", ()))
        start = 0 if architecture.image_first else q.shape[2 if split else 1] - references - padded
        masked = any(isinstance(value, Tensor) for value in (*args, kwargs.get("mask")))
        joint = Joint(layer, slice(start, start + layer.positions), split, masked)
        return enter(joint, attend, (q, k, v), kwargs["transformer_options"])

    def begin(place: Block) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            nonlocal block
            block = place

        return hook

    modules = [module for held in architecture.blocks for module in getattr(model, held)]
    places = zip(dit_blocks(model), modules, strict=True)
    hooks = [module.register_forward_pre_hook(begin(place)) for place, module in places]
    try:
        yield {**options, OVERRIDE: override}
    finally:
        for handle in hooks:
            handle.remove()


def turned(model: nn.Module, image: Tensor, by: int) -> Tensor:
    """Queries or keys of image tokens [b, n, heads, d] as they would be behind a prompt of `by` more tokens."""
    embedder = model.rope_embedder
    channels = embedder.axes_dim[0]
    angles = rope(torch.tensor([[by]], device=image.device), channels, embedder.theta)[0, 0]  # [channels / 2, 2, 2]
    pairs = image[..., :channels].unflatten(-1, (-1, 2)).float()
    first = (angles @ pairs[..., None])[..., 0].flatten(-2).to(image)
    return torch.cat([first, image[..., channels:]], -1)
