"""The blocks of a UNet or a flow transformer whose attention edits read, and how people name them."""

from __future__ import annotations

import re

from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn

from ..dit.architectures import dit_blocks
from ..layer import Block
from ..quote import quoted
from ..unet.tree import all_layers, blocks_with, decoder_from_second

VITAL = "vital"
# Of Flux.1: the layers without which a picture changes most, as Stable Flow (arXiv 2411.14430) found them.
VITAL_BLOCKS = tuple(("double", n) for n in (0, 1, 17, 18)) + tuple(("single", n) for n in (6, 9, 34, 35, 37))


def attention_blocks(network: nn.Module) -> list[Block]:
    """The blocks with attention of the image, from the first to the last."""
    return blocks_with(network, SpatialTransformer) if isinstance(network, UNetModel) else dit_blocks(network)


def layout_blocks(network: nn.Module) -> list[Block]:
    """Where Plug-and-Play injects attention: a UNet's decoder from its second block on, all of a flow transformer."""
    return decoder_from_second(network) if isinstance(network, UNetModel) else dit_blocks(network)


def attention_layers(network: nn.Module) -> list[tuple[Block, int]]:
    """Every self-attention layer in the order that it runs in, by its block and its index there."""
    return all_layers(network) if isinstance(network, UNetModel) else [(block, 0) for block in dit_blocks(network)]


def last_layers(network: nn.Module, first: int) -> frozenset[tuple[Block, int]]:
    """The self-attention layers from number `first` on; where that is -1, from 10/16 of them on, as MasaCtrl in SD1.x.

    Raises ValueError where there are not so many.
    """
    layers = attention_layers(network)
    first = len(layers) * 10 // 16 if first < 0 else first
    if first >= len(layers):
        raise ValueError(
            f"MasaCtrl begins at attention layer {first}, but this MODEL has {len(layers)}: set first_layer below that."
        )
    return frozenset(layers[first:])


def layers_in(network: nn.Module, text: str, field: str) -> frozenset[tuple[Block, int]]:
    """The self-attention layers of the blocks that `text` names, or of Flux.1's vital ones.

    Raises ValueError as parse_blocks.
    """
    valid = attention_blocks(network)
    if text.strip().lower() == VITAL:
        if not set(VITAL_BLOCKS) <= set(valid):
            raise ValueError(
                f"{field} is {VITAL}, which is known of Flux.1's blocks alone, but this MODEL has {named(valid)}: name "
                "blocks of it."
            )
        blocks = VITAL_BLOCKS
    else:
        blocks = parse_blocks(text, valid, field)
    return frozenset(layer for layer in attention_layers(network) if layer[0] in blocks)


def parse_blocks(text: str, valid: list[Block], field: str) -> tuple[Block, ...]:
    """Blocks from "output 4-11, middle, input 8" or "double 0-3, single 9"; a number alone is one of the last kind.

    Raises ValueError, naming the part of the text and listing the valid blocks.
    """
    blocks: list[Block] = []
    for part in filter(None, (part.strip().lower() for part in text.split(","))):
        match = re.fullmatch(r"(?:([a-z]+)\s+)?(\d{1,4})(?:\s*-\s*(\d{1,4}))?|(middle)", part)
        if match is None:
            found = []
        elif match[4]:
            found = [("middle", 0)]
        else:
            found = [(match[1] or valid[-1][0], n) for n in range(int(match[2]), int(match[3] or match[2]) + 1)]
        if not found or any(block not in valid for block in found):
            raise ValueError(f"{field} has {quoted(part)}, but the blocks to choose from are {named(valid)}.")
        blocks += found
    return tuple(dict.fromkeys(blocks))


def named(blocks: list[Block]) -> str:
    """ "input 1, 2; middle; output 3-11" """
    parts = []
    for side in dict.fromkeys(name for name, _ in blocks):
        numbers = [number for name, number in blocks if name == side]
        runs: list[list[int]] = []
        for number in numbers:
            if runs and number == runs[-1][-1] + 1:
                runs[-1].append(number)
            else:
                runs.append([number])
        spans = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
        parts.append(side if side == "middle" else f"{side} {spans}")
    return "; ".join(parts)
