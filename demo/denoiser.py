"""The UNet and the text encoder for training."""

from __future__ import annotations

import copy
import math

import comfy.ops
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from torch import Tensor, nn
from torch.nn.functional import conv2d

from .model import UNET
from .text import TextEncoder, attention

TIMESTEPS = 1000
ALPHA_BAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2, 0).float()


class Operations(comfy.ops.disable_weight_init):
    """The host's layers, with convolutions cut to at most 128 inputs.

    Beyond that the bfloat16 weight gradient of processors without AMX is 25 times as slow.
    """

    class Conv2d(comfy.ops.disable_weight_init.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            parts = zip(x.split(128, 1), self.weight.split(128, 1), strict=True)
            first, *others = (conv2d(part, weight, None, self.stride, self.padding) for part, weight in parts)
            return sum(others, first) + self.bias.to(first.dtype).view(-1, 1, 1)


class Denoiser(nn.Module):
    """UNet and text encoder, trained together; predicts v."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextEncoder()
        self.unet = UNetModel(**copy.deepcopy(UNET), device="cpu", dtype=torch.float32, operations=Operations)
        initialise(self.unet)
        for module in self.unet.modules():  # every residual branch starts as zero
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.out_layers[-1].weight)
            elif isinstance(module, SpatialTransformer):
                nn.init.zeros_(module.proj_out.weight)
        nn.init.zeros_(self.unet.out[-1].weight)
        self.requires_grad_(True)

    def forward(self, noisy: Tensor, timestep: Tensor, rows: Tensor) -> Tensor:
        return self.velocity(noisy, timestep, self.text(rows))

    def velocity(
        self, noisy: Tensor, timestep: Tensor, text: Tensor, control: dict[str, list[Tensor]] | None = None
    ) -> Tensor:
        options = {"optimized_attention_override": attention}
        return self.unet._forward(noisy, timestep.float(), text, control=control, transformer_options=options)

    def denoised(self, noisy: Tensor, timestep: Tensor, rows: Tensor) -> Tensor:
        return self.denoised_by(noisy, timestep, self.text(rows))

    def denoised_by(self, noisy: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The image that the embeddings of captions make of it."""
        alpha_bar = ALPHA_BAR[timestep].view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * self.velocity(noisy, timestep, text)


def initialise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
