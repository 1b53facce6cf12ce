"""Checkpoints with the true architecture of SD1.5 or SDXL and random weights, as the stock loader takes them."""

from __future__ import annotations

import math
from pathlib import Path

import comfy.ldm.models.autoencoder
import comfy.model_base
import comfy.sd1_clip
import comfy.sdxl_clip
import torch
from safetensors.torch import save_file
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
    """A file of fp16 weights, random within what keeps activations finite; `kind` is "sd15" or "sdxl"."""
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
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).half()
    save_file({name: _weights(name, shape, noise) for name, shape in shapes.items()}, path)


def _weights(name: str, like: Tensor, noise: Tensor) -> Tensor:
    if not like.is_floating_point():
        return torch.arange(like.shape[-1]).expand(like.shape).contiguous()
    if like.ndim < 2:
        return torch.full(like.shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.float16)
    repeats = math.ceil(like.numel() / len(noise))
    scale = 0.5 * like[0].numel() ** -0.5
    return (noise.repeat(repeats)[: like.numel()] * scale).reshape(like.shape)
