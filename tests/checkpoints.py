"""Checkpoints with the true architecture of SD1.5 or SDXL and random weights, as the stock loader takes them."""

from __future__ import annotations

import math
from pathlib import Path

import comfy.ldm.models.autoencoder
import comfy.model_base
import comfy.sd1_clip
import comfy.sdxl_clip
import torch
from torch import Tensor

from palimpsest.benchmarks.architectures import CONFIGS, UNETS

VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
TEXT_ENCODERS = {"sd15": comfy.sd1_clip.SD1ClipModel, "sdxl": comfy.sdxl_clip.SDXLClipModel}


def write_checkpoint(kind: str, path: Path) -> None:
    """A .ckpt file of fp16 weights, random within what keeps activations finite; `kind` is "sd15" or "sdxl".

    Weights of one scale share their memory, in the file and when it is read: it takes 0.3 GB, not 7.
    """
    meta = torch.device("meta")
    config = CONFIGS[kind](UNETS[kind])
    config.set_inference_dtype(torch.float16, None)
    unet = config.get_model({}, device=meta).diffusion_model.state_dict()
    text = TEXT_ENCODERS[kind](device=meta, dtype=torch.float16).state_dict()
    with meta:
        vae = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=VAE, embed_dim=4).state_dict()
    shapes = config.process_unet_state_dict_for_saving(unet)
    shapes |= config.process_clip_state_dict_for_saving(text)
    shapes |= config.process_vae_state_dict_for_saving(vae)
    torch.save(_weights(shapes), path)


def _weights(shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pools: dict[int, Tensor] = {}  # by fan-in
    for like in sorted(shapes.values(), key=Tensor.numel, reverse=True):
        if like.ndim > 1 and like.is_floating_point() and (fan_in := like[0].numel()) not in pools:
            noise = torch.randn(2**22, generator=generator).half().repeat(math.ceil(like.numel() / 2**22))
            pools[fan_in] = noise[: like.numel()] * (0.5 * fan_in**-0.5)

    def weight(name: str, like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return torch.arange(like.shape[-1]).expand(like.shape).contiguous()
        if like.ndim < 2:
            return torch.full(like.shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.float16)
        return pools[like[0].numel()][: like.numel()].view(like.shape)

    return {name: weight(name, like) for name, like in shapes.items()}
