"""What the host's flow transformers look like inside: a new architecture is one line of `ARCHITECTURES`."""

from __future__ import annotations

import math
from collections.abc import Callable
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

from ..layer import Block


class Architecture(NamedTuple):
    """blocks: attributes of the model that hold its main blocks, in the order they run in, and what to call them.
    text: finds the linear layer that takes the prompt's embeddings.
    width: the attribute that holds the channels of a token in their attention.
    image_first: whether the image's tokens come before the text's; they come after it, but for reference images.
    turned: whether image positions begin after the text, so that keys of a prompt of another length have to be turned.
    """

    blocks: dict[str, str]
    text: Callable[[nn.Module], nn.Linear]
    width: str
    image_first: bool = False
    turned: bool = False


STREAMS = {"double_blocks": "double", "single_blocks": "single"}
ARCHITECTURES: dict[type[nn.Module], Architecture] = {
    Flux: Architecture(STREAMS, lambda model: model.txt_in, "hidden_size"),
    Chroma: Architecture(STREAMS, lambda model: model.txt_in, "hidden_size"),
    OpenAISignatureMMDITWrapper: Architecture(
        {"joint_blocks": "block"}, lambda model: model.context_embedder, "hidden_size"
    ),
    QwenImageTransformer2DModel: Architecture({"transformer_blocks": "block"}, lambda model: model.txt_in, "inner_dim"),
    NextDiT: Architecture({"layers": "block"}, lambda model: model.cap_embedder[1], "dim", turned=True),
    WanModel: Architecture({"blocks": "block"}, lambda model: model.text_embedding[0], "dim", image_first=True),
    HiDreamImageTransformer2DModel: Architecture(
        {"double_stream_blocks": "double", "single_stream_blocks": "single"},
        lambda model: model.caption_projection[-1].linear,
        "inner_dim",
        image_first=True,
    ),
}


def architecture_of(model: nn.Module) -> Architecture | None:
    """Of exactly this class: what a kind of its own does inside is not known."""
    return ARCHITECTURES.get(type(model))


def prompt_width(model: nn.Module) -> int | None:
    """Channels of the embeddings that its prompts have; None where the model is not known."""
    architecture = architecture_of(model)
    return None if architecture is None else architecture.text(model).in_features


def dit_blocks(model: nn.Module) -> list[Block]:
    """The main blocks in the order that they run in: ("double", 0), ..., ("single", 37)."""
    blocks = ARCHITECTURES[type(model)].blocks
    return [(name, number) for held, name in blocks.items() for number in range(len(getattr(model, held)))]


def width(model: nn.Module) -> int:
    """The channels of a token's query, key or value, of all heads."""
    return getattr(model, ARCHITECTURES[type(model)].width)


def grid(model: nn.Module, latent: Tensor) -> tuple[int, int]:
    """Height and width of the image in tokens, for its latent [b, c, (t,) h, w]; frames stand below each other."""
    patch = model.patch_size if isinstance(model.patch_size, tuple) else (1, model.patch_size, model.patch_size)
    time, height, width = (math.ceil(size / by) for size, by in zip((1, *latent.shape[2:])[-3:], patch, strict=True))
    return time * height, width


def padded(model: nn.Module, tokens: int) -> int:
    """How many tokens so many of a prompt or an image are in its attention."""
    multiple = getattr(model, "pad_tokens_multiple", None) or 1
    return math.ceil(tokens / multiple) * multiple


def turned(model: nn.Module, tokens: Tensor, by: int) -> Tensor:
    """Queries or keys [b, n, heads, d] as they would be behind a prompt of `by` more tokens."""
    embedder = model.rope_embedder
    channels = embedder.axes_dim[0]
    angles = rope(torch.tensor([[by]], device=tokens.device), channels, embedder.theta)[0, 0]  # [channels / 2, 2, 2]
    pairs = tokens[..., :channels].unflatten(-1, (-1, 2)).float()
    first = (angles @ pairs[..., None])[..., 0].flatten(-2).to(tokens)
    return torch.cat([first, tokens[..., channels:]], -1)
