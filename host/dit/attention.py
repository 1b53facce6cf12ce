"""A way into a flow transformer's attention for one model call.

In each main block of all of them the first attention is the one of the image's tokens, alone or joined with the text's;
an override of the host's attention reaches it, and hooks on the blocks tell which of them it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layer import Block, Layer
from .architectures import ARCHITECTURES, dit_blocks, grid, padded

OVERRIDE = "optimized_attention_override"


class Parts(NamedTuple):
    """The tokens of a joint attention: a prompt's, its padding, the image's, and what follows them."""

    words: Tensor
    padding: Tensor
    image: Tensor
    others: Tensor


class Joint(NamedTuple):
    """One attention of image and text tokens.

    layer: its place, with the size of its image. where: the image's tokens among all.
    heads: how many it has. split: whether tensors are [rows, heads, tokens, d], else [rows, tokens, heads * d] or
    [rows, tokens, heads, d].
    masked: whether some tokens are left out, by a mask that fits their number.
    """

    layer: Layer
    where: slice
    heads: int
    split: bool
    masked: bool

    def image(self, tensor: Tensor) -> Tensor:
        """The image's tokens of queries, keys or values: a view [rows, image tokens, ...]."""
        return (tensor.transpose(1, 2) if self.split else tensor)[:, self.where]

    def parts(self, tensor: Tensor, words: int) -> Parts:
        """Views [rows, tokens, ...] of queries, keys or values, of which the first `words` are the prompt's."""
        tokens, start, stop = tensor.transpose(1, 2) if self.split else tensor, self.where.start, self.where.stop
        return Parts(tokens[:, :words], tokens[:, words:start], tokens[:, start:stop], tokens[:, stop:])

    def joined(self, *parts: Tensor) -> Tensor:
        """[rows, tokens, ...] one after the other, as queries, keys or values of an attention."""
        tokens = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return tokens.transpose(1, 2) if self.split else tokens

    def with_image(self, tensor: Tensor, image: Tensor) -> Tensor:
        """`tensor` with image tokens more or fewer than its own."""
        return self.joined(*self.parts(tensor, 0)._replace(image=image))


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The attention of queries, keys and values as the model has them: [rows, tokens, heads * d]."""

Enter = Callable[[Joint, Attend, tuple[Tensor, Tensor, Tensor], dict], Tensor]
"""Takes an attention, what to go on with, its queries, keys and values, and its options; returns what that returns."""


@contextmanager
def joint_attention(model: nn.Module, latent: Tensor, options: dict, enter: Enter) -> Iterator[dict]:
    """Transformer options by which every attention of the image passes through `enter`, around another pack's override.

    latent: [rows, c, (t,) h, w], what the model is called on.
    """
    architecture, inner = ARCHITECTURES[type(model)], options.get(OVERRIDE)
    height, width = grid(model, latent)
    tokens = padded(model, height * width)
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
        start = 0 if architecture.image_first else q.shape[2 if split else 1] - references - tokens
        masked = any(isinstance(value, Tensor) for value in (*args, kwargs.get("mask")))
        joint = Joint(layer, slice(start, start + layer.positions), heads, split, masked)
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
