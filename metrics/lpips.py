"""LPIPS on SqueezeNet: how far two pictures are apart in the eyes of a network.

Zhang, Isola, Efros, Shechtman and Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
arXiv 1801.03924, equation 1, version 0.1: torchvision's SqueezeNet 1.1 and seven linear heads. Pure torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from torchvision.models import squeezenet1_1

from .pixels import mean

ENDS = (1, 4, 7, 9, 10, 11, 12)  # the layers of SqueezeNet's features that are compared
CHANNELS = (64, 128, 256, 384, 384, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in -1..1
SMALLEST = 32  # pixels, of which the last layer makes one


class Lpips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = squeezenet1_1()
        self.heads = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for channels in CHANNELS)

    def load(self, network: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        """The weights as torchvision and the authors of LPIPS name them. Raises RuntimeError for others."""
        self.network.load_state_dict(network)
        self.heads.load_state_dict({key.replace("lin", "").replace("model.1.", ""): heads[key] for key in heads})

    def features(self, pictures: Tensor) -> list[Tensor]:
        """[b, h, w, 3] in 0..1 to unit vectors [b, c, ...] of each layer."""
        shift, scale = (torch.tensor(each).to(pictures)[:, None, None] for each in (SHIFT, SCALE))
        x, found = (2 * pictures.movedim(-1, 1) - 1 - shift) / scale, []
        for i, layer in enumerate(self.network.features):
            x = layer(x)
            if i in ENDS:
                found.append(normalize(x, dim=1, eps=1e-10))
        return found

    def forward(self, one: Tensor, other: Tensor, where: Tensor | None = None) -> Tensor:
        """[b]: pictures [b, h, w, 3] in 0..1. `where` [b, h, w] restricts the mean to the places around its pixels."""
        layers = zip(self.features(one), self.features(other), self.heads, strict=True)
        maps = [head((a - b) ** 2) for a, b, head in layers]
        if where is not None:
            maps = [interpolate(each, where.shape[1:], mode="bilinear") for each in maps]
        return torch.stack([mean(each[:, 0], where) for each in maps]).sum(0)
