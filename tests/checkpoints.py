"""Checkpoints with the true architecture of SD1.5 or SDXL and random weights, as the stock loader takes them."""

from __future__ import annotations

import math
from pathlib import Path

import comfy.ldm.models.autoencoder
import comfy.model_base
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import torch
from safetensors.torch import save_file
from torch import Tensor

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
COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
UNETS = {
    "sd15": COMMON
    | {
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1] * 9 + [0] * 3,
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": False,
        "context_dim": 768,
        "adm_in_channels": None,
    },
    "sdxl": COMMON
    | {
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "use_linear_in_transformer": True,
        "context_dim": 2048,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    },
}
CONFIGS = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}
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
