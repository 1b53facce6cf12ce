"""Structure distance: how differently the parts of two pictures are like each other.

Tumanyan, Bar-Tal, Bagon and Dekel, "Splicing ViT Features for Semantic Appearance Transfer", arXiv 2201.00424: the
cosine similarity of all keys of the last layer of a DINO ViT (Caron et al., arXiv 2104.14294) with each other, and the
mean squared difference of two pictures' similarities. Pure torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, normalize, scaled_dot_product_attention

SIDE, LONGEST = 224, 480  # pixels: the shorter side that pictures are scaled to, and the most of the longer one
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEAD = 64  # channels


class DinoViT(nn.Module):
    """As far as the keys of the last layer. Its sizes are those of the weights, named as their authors name them."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Raises KeyError and RuntimeError for other weights."""
        super().__init__()
        width, patch = weights["cls_token"].shape[-1], weights["patch_embed.proj.weight"].shape[-1]
        depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros_like(weights["pos_embed"]))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.load_state_dict(weights)

    def forward(self, pixels: Tensor) -> Tensor:
        """[b, 1 + patches, width]: the keys, those of all heads together, of normalised pixels [b, 3, h, w]."""
        patches = self.patch_embed.proj(pixels)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches.flatten(2).mT], 1)
        x = x + self._positions(*patches.shape[2:])
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        return last.attn.qkv(last.norm1(x)).chunk(3, -1)[1]

    def _positions(self, height: int, width: int) -> Tensor:
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if (height, width) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].mT.unflatten(2, (side, side))
        grid = interpolate(grid, (height, width), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], 1)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        x = x + self.attn.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(gelu(self.mlp.fc1(self.norm2(x))))


def structure_distance(vit: DinoViT, one: Tensor, other: Tensor, published: bool = False) -> Tensor:
    """[b]: pictures [b, h, w, 3] in 0..1.

    `published`: as PIE-Bench's own code computes it, which normalises values of 0..255 as if they were 0..1.
    """
    similarities = [self_similarity(vit(prepared(picture * 255 if published else picture))) for picture in (one, other)]
    return ((similarities[0] - similarities[1]) ** 2).mean((1, 2))


def self_similarity(keys: Tensor) -> Tensor:
    """[b, n, n]: the cosine of every two keys of [b, n, c]."""
    keys = normalize(keys, dim=-1)
    return keys @ keys.mT


def prepared(pictures: Tensor) -> Tensor:
    """[b, h, w, 3] to [b, 3, h', w']: scaled, and normalised as ImageNet's."""
    mean, deviation = (torch.tensor(each).to(pictures)[:, None, None] for each in (MEAN, DEVIATION))
    scaled = interpolate(pictures.movedim(-1, 1), _size(*pictures.shape[1:3]), mode="bilinear", antialias=True)
    return (scaled - mean) / deviation


def _size(height: int, width: int) -> tuple[int, int]:
    shorter, longer = sorted((height, width))
    sides = SIDE, SIDE * longer // shorter
    if sides[1] > LONGEST:
        sides = LONGEST * SIDE // sides[1], LONGEST
    return sides if height <= width else sides[::-1]
