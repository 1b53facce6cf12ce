"""What blocks a UNet has, read from its module tree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from comfy.ldm.modules.attention import CrossAttention, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from torch import Tensor, nn

from ..layer import Block, Layer


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


def attention_of(unet: UNetModel, layer: Layer) -> CrossAttention:
    """The module of a self-attention layer."""
    transformer = next(part for part in layers_of(unet, layer.block_id) if isinstance(part, SpatialTransformer))
    return transformer.transformer_blocks[layer.index].attn1


def prompt_width(unet: UNetModel) -> int | None:
    """Channels of the embeddings that its cross-attention reads; None where it has none."""
    transformers = (layer for layer in unet.modules() if isinstance(layer, SpatialTransformer))
    first = next(transformers, None)
    return None if first is None else first.transformer_blocks[0].attn2.to_k.in_features


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
