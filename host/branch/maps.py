"""Word maps: how much each image position attends to chosen words.

They may be carried over the image by its self-attention, so that they spread over what belongs together: S @ A with the
mean self-attention map S and the mean word map A, as DiffSegmenter completes its maps (arXiv 2309.02773), here at the
word maps' own size.
"""

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


def layout_map(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """The mean over heads of softmax(query key^T / sqrt(d)), [b, positions, positions] fp32.

    query, key: [b, positions, heads * d]. One head after the other, as a map of 32 x 32 positions takes 4 MiB.
    """
    pairs = zip(*(t.float().unflatten(-1, (heads, -1)).unbind(2) for t in (query, key)), strict=True)
    return sum(torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) for q, k in pairs) / heads


class WordMaps:
    """The maps of one model call: means over the layers of one size, source and target apart.

    columns: [b, source tokens, m] and [b, target tokens, m], the phrases of each image.
    layout: whether the maps are carried by the mean self-attention map of the same layers.
    """

    def __init__(self, columns: tuple[Tensor, Tensor], size: tuple[int, int], layout: bool = False) -> None:
        self.columns, self.size, self.layout = columns, size, layout
        self.sums: dict[tuple[str, str], tuple[Tensor, int]] = {}  # by side and kind of layer, and of how many
        self.given: Tensor | None = None

    def measures(self, layer: Layer) -> bool:
        return (layer.kind == "cross" or self.layout) and (layer.height, layer.width) == self.size

    def give_source(self, maps: Tensor) -> None:
        """maps: [b, phrases, h, w], the source's from an attention store."""
        self.given = maps

    def add(self, side: str, maps: Tensor, kind: str = "cross") -> None:
        """maps: [b, positions, phrases] of one layer, or [b, positions, positions] where its kind is "self"."""
        total, layers = self.sums.get((side, kind), (0, 0))
        self.sums[side, kind] = total + maps, layers + 1

    def means(self) -> tuple[Tensor, Tensor]:
        """Of source and target, [b, phrases, h, w] each. Raises ValueError where no layer has the wanted size, or all
        self-attention of that size looks from one image to the other.
        """
        if ("target", "cross") not in self.sums:
            raise ValueError(
                f"Local Blend finds no cross-attention of {self.size[0]} x {self.size[1]} positions in this MODEL to "
                "locate words by: use a larger image, or a mask of your own without words."
            )
        if self.layout and ("target", "self") not in self.sums:
            raise ValueError(
                f"Local Blend's mask_from 'words and layout' finds no self-attention of {self.size[0]} x "
                f"{self.size[1]} positions in which the target does not read the source's keys: set mask_from to "
                "words, or narrow the layers of MasaCtrl."
            )
        source = self._maps("source") if self.given is None else self.given
        return source, self._maps("target")

    def _maps(self, side: str) -> Tensor:
        maps = self._mean(side, "cross")
        if self.layout:
            maps = self._mean(side, "self") @ maps
        return maps.transpose(1, 2).unflatten(-1, self.size)

    def _mean(self, side: str, kind: str) -> Tensor:
        total, layers = self.sums[side, kind]
        return total / layers
