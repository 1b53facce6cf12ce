"""Word maps: how much each image position attends to chosen words."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layer import Layer

MAP_SIDE = 12  # positions a side that a word map needs to show where a thing is


def map_size(latent: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the layers whose maps place a word: a quarter of the latent's, finer where that is too coarse.

    At 512 pixels these are the 16 x 16 layers of Prompt-to-Prompt's local blend, for SDXL at 1024 those of 32 x 32.
    """
    sizes = [latent]
    for _ in range(2):  # the UNet's downsampling convolutions round up
        sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
    return next((size for size in reversed(sizes) if min(size) >= MAP_SIDE), sizes[0])


def attention_maps(query: Tensor, key: Tensor, heads: int, tokens: int) -> Tensor:
    """softmax(query key^T / sqrt(d)), [b, heads, positions, tokens] fp32.

    query: [b, positions, heads * d]; key: [b, k * tokens, heads * d], the prompt's tokens tiled k times.
    """
    query, key = (t.float().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key))
    maps = torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, -1)
    return maps.unflatten(-1, (-1, tokens)).sum(-2)


def token_maps(query: Tensor, key: Tensor, heads: int, tokens: int) -> Tensor:
    """The mean over heads of `attention_maps`: [b, positions, tokens]."""
    return attention_maps(query, key, heads, tokens).mean(1)


class WordMaps:
    """The maps of one model call: means over the layers of one size, source and target apart.

    columns: [b, source tokens, m] and [b, target tokens, m], the phrases of each image.
    """

    def __init__(self, columns: tuple[Tensor, Tensor], size: tuple[int, int]) -> None:
        self.columns, self.size = columns, size
        self.sums: dict[str, Tensor] = {}
        self.layers = {"source": 0, "target": 0}
        self.given: Tensor | None = None

    def measures(self, layer: Layer) -> bool:
        return layer.kind == "cross" and (layer.height, layer.width) == self.size

    def give_source(self, maps: Tensor) -> None:
        """maps: [b, phrases, h, w], the source's from an attention store."""
        self.given = maps

    def add(self, side: str, maps: Tensor) -> None:
        """maps: [b, positions, phrases] of one layer."""
        self.sums[side] = self.sums[side] + maps if side in self.sums else maps
        self.layers[side] += 1

    def means(self) -> tuple[Tensor, Tensor]:
        """Of source and target, [b, phrases, h, w] each. Raises ValueError where no layer has the wanted size."""
        if "target" not in self.sums:
            raise ValueError(
                f"Local Blend finds no cross-attention of {self.size[0]} x {self.size[1]} positions in this MODEL to "
                "locate words by: use a larger image, or a mask of your own without words."
            )
        source = self._mean("source") if self.given is None else self.given
        return source, self._mean("target")

    def _mean(self, side: str) -> Tensor:
        return (self.sums[side] / self.layers[side]).transpose(1, 2).unflatten(-1, self.size)
