"""What blocks a UNet has, read from its module tree, and how people name them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from comfy.ldm.modules.attention import CrossAttention, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from torch import Tensor, nn

from .layer import Block, Layer
from .quote import quoted


def blocks_with(unet: UNetModel, kind: type[nn.Module]) -> list[Block]:
    """The blocks that hold a layer of `kind`, from the first to the last."""
    sides = {"input": unet.input_blocks, "middle": [unet.middle_block], "output": unet.output_blocks}
    return [
        (side, number)
        for side, blocks in sides.items()
        for number, block in enumerate(blocks)
        if any(isinstance(layer, kind) for layer in block)
    ]


def all_layers(unet: UNetModel) -> list[tuple[Block, int]]:
    """Every self-attention layer in the order that it runs in, by its block and its index there."""
    return [
        (block, index)
        for block in blocks_with(unet, SpatialTransformer)
        for layer in layers_of(unet, block)
        if isinstance(layer, SpatialTransformer)
        for index in range(len(layer.transformer_blocks))
    ]


def last_layers(unet: UNetModel, first: int) -> frozenset[tuple[Block, int]]:
    """The self-attention layers from number `first` on; where that is -1, from 10/16 of them on, as MasaCtrl in SD1.x.

    Raises ValueError where there are not so many.
    """
    layers = all_layers(unet)
    first = len(layers) * 10 // 16 if first < 0 else first
    if first >= len(layers):
        raise ValueError(
            f"MasaCtrl begins at attention layer {first}, but this MODEL has {len(layers)}: set first_layer below that."
        )
    return frozenset(layers[first:])


def attention_of(unet: UNetModel, layer: Layer) -> CrossAttention:
    """The module of a self-attention layer."""
    transformer = next(part for part in layers_of(unet, layer.block_id) if isinstance(part, SpatialTransformer))
    return transformer.transformer_blocks[layer.index].attn1


def layers_of(unet: UNetModel, block: Block) -> nn.Module:
    side, number = block
    return unet.middle_block if side == "middle" else getattr(unet, f"{side}_blocks")[number]


@contextmanager
def residual_hooks(
    unet: UNetModel, blocks: Iterable[Block], change: Callable[[Block, Tensor], Tensor]
) -> Iterator[None]:
    """Within it, the output of each block's residual branch passes through `change` before the skip is added."""

    def hook(block: Block) -> Callable:
        return lambda module, inputs, output: change(block, output)

    hooks = [_residual_layer(unet, block).register_forward_hook(hook(block)) for block in blocks]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _residual_layer(unet: UNetModel, block: Block) -> nn.Module:
    return next(layer for layer in layers_of(unet, block) if isinstance(layer, ResBlock)).out_layers[-1]


def decoder_from_second(unet: UNetModel) -> list[Block]:
    """The decoder's attention blocks from the second on: Plug-and-Play's 4 to 11 in SD1.x and SD2.x, 1 to 5 in SDXL."""
    return [block for block in blocks_with(unet, SpatialTransformer) if block[0] == "output"][1:]


def parse_blocks(text: str, valid: list[Block], field: str) -> tuple[Block, ...]:
    """Blocks from "output 4-11, middle, input 8"; a number alone is an output block.

    Raises ValueError, naming the part of the text and listing the valid blocks.
    """
    blocks: list[Block] = []
    for part in filter(None, (part.strip().lower() for part in text.split(","))):
        match = re.fullmatch(r"(?:(input|output)\s+)?(\d{1,4})(?:\s*-\s*(\d{1,4}))?|(middle)", part)
        if match is None:
            found = []
        elif match[4]:
            found = [("middle", 0)]
        else:
            found = [(match[1] or "output", n) for n in range(int(match[2]), int(match[3] or match[2]) + 1)]
        if not found or any(block not in valid for block in found):
            raise ValueError(f"{field} has {quoted(part)}, but the blocks to choose from are {named(valid)}.")
        blocks += found
    return tuple(dict.fromkeys(blocks))


def named(blocks: list[Block]) -> str:
    """ "input 1, 2, middle, output 3-11" """
    parts = []
    for side in ("input", "middle", "output"):
        numbers = [number for name, number in blocks if name == side]
        runs: list[list[int]] = []
        for number in numbers:
            if runs and number == runs[-1][-1] + 1:
                runs[-1].append(number)
            else:
                runs.append([number])
        spans = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
        if numbers:
            parts.append(side if side == "middle" else f"{side} {spans}")
    return "; ".join(parts)
