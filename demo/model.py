"""The embedded demo model in the host's own classes: an SD1.5-like UNet, a CLIP text encoder and an autoencoder.

The UNet and the text encoder are laid out as SD1.5's are, only smaller. Latents are one orthonormal Haar level of the
half-size picture (12 channels, 1/4 of the side), so encoding is exact and linear; the decoder, the host's KL decoder,
draws the full-size picture from them. One fp16 safetensors file holds all three.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import comfy.latent_formats
import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.model import Decoder
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from .tokenizer import DemoTokenizer

WEIGHTS = Path(__file__).parent / "demo-model.safetensors"

UNET = {
    "image_size": 16,
    "in_channels": 12,
    "out_channels": 12,
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_res_blocks": [2, 2],
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "transformer_depth": [1, 1, 1, 1],
    "transformer_depth_output": [1] * 6,
    "transformer_depth_middle": 1,
    "context_dim": 64,
    "adm_in_channels": None,
    "legacy": False,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
DECODER = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": [1, 2, 3],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "in_channels": 3,
    "resolution": 64,
    "z_channels": 12,
}
# Each latent channel is (coefficient - mean) * scale: colours red, green, blue, and of each the bands LL, LH, HL, HH.
LATENT_MEAN = (1.3997, 0, 0, 0, 1.2602, 0, 0, 0, 1.0026, 0, 0, 0)
LATENT_SCALE = (0.5496, 3.1037, 3.1037, 3.1037) * 3


class Autoencoder(nn.Module):
    """Pixels [b, 3, H, W] in [-1, 1] to latents [b, 12, H/4, W/4] and back."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder(**DECODER)

    def encode(self, pixels: Tensor) -> Tensor:
        a, b, c, d = rearrange(avg_pool2d(pixels, 2), "b c (h i) (w j) -> (i j) b c h w", i=2, j=2)
        bands = torch.stack((a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d), 2)
        coefficients = rearrange(bands, "b c k h w -> b (c k) h w")
        return (coefficients - _per_channel(coefficients, LATENT_MEAN)) * _per_channel(coefficients, LATENT_SCALE)

    def decode(self, latent: Tensor) -> Tensor:
        if latent.shape[1] != UNET["in_channels"]:
            raise ValueError(
                f"The demo model's VAE decodes latents of {UNET['in_channels']} channels, not of {latent.shape[1]}: "
                "connect the VAE of the model that made the latent."
            )
        return interpolate(self.half_size(latent), scale_factor=2, mode="bilinear") + self.decoder(latent)

    def half_size(self, latent: Tensor) -> Tensor:
        """The half-size picture [b, 3, H/2, W/2] that `encode` saw: its exact inverse."""
        coefficients = latent / _per_channel(latent, LATENT_SCALE) + _per_channel(latent, LATENT_MEAN)
        s, x, y, xy = rearrange(coefficients, "b (c k) h w -> k b c h w", k=4) / 4
        corners = torch.stack((s + x + y + xy, s - x + y - xy, s + x - y - xy, s - x - y + xy))
        return rearrange(corners, "(i j) b c h w -> b c (h i) (w j)", i=2, j=2)


def _per_channel(like: Tensor, values: tuple[float, ...]) -> Tensor:
    return like.new_tensor(values).view(1, -1, 1, 1)


class LatentFormat(comfy.latent_formats.LatentFormat):
    latent_channels = UNET["in_channels"]
    spacial_downscale_ratio = 4
    # The previews' linear guess at the colours: each colour's own LL band, undone as in `Autoencoder.half_size`.
    latent_rgb_factors = (
        torch.eye(3)
        .repeat_interleave(4, 0)
        .mul(torch.tensor((1.0, 0, 0, 0) * 3)[:, None])
        .div(4 * LATENT_SCALE[0])
        .tolist()
    )
    latent_rgb_factors_bias = [mean / 4 for mean in LATENT_MEAN[::4]]


class ModelConfig(comfy.supported_models_base.BASE):
    unet_extra_config = {}  # the host's default would overrule the attention heads of UNET
    latent_format = LatentFormat
    memory_usage_factor = 1.0

    def inpaint_model(self) -> bool:
        return False


def load(path: Path = WEIGHTS) -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """The model, its text encoder and its autoencoder as the host's objects, in fp32."""
    weights = comfy.utils.load_torch_file(str(path), safe_load=True)
    return _load_unet(weights), _load_clip(weights), _load_vae(weights)


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value.float() for key, value in weights.items() if key.startswith(prefix)}


def _load_unet(weights: dict[str, Tensor]) -> ModelPatcher:
    config = ModelConfig(copy.deepcopy(UNET))
    config.set_inference_dtype(torch.float32, None)
    offload_device = comfy.model_management.unet_offload_device()
    model = config.get_model(weights, device=offload_device)
    model.diffusion_model.load_state_dict(_part(weights, "unet."))
    return ModelPatcher(model, comfy.model_management.get_torch_device(), offload_device)


def _load_clip(weights: dict[str, Tensor]) -> comfy.sd.CLIP:
    tokenizer = partial(DemoTokenizer, weights["text.ids"].tolist())
    target = comfy.supported_models_base.ClipTarget(tokenizer, comfy.sd1_clip.SD1ClipModel)
    clip = comfy.sd.CLIP(target, model_options={"clip_l_model_config": TEXT, "dtype": torch.float32})
    text = _part(weights, "text.model.")
    tokens = weights["text.tokens"].float()
    # Only the words of scene captions were trained; every other token is their mean.
    table = tokens.mean(0).repeat(clip.cond_stage_model.clip_l.transformer.get_input_embeddings().num_embeddings, 1)
    table[weights["text.ids"].long()] = tokens
    text["embeddings.token_embedding.weight"] = table
    clip.cond_stage_model.clip_l.transformer.text_model.load_state_dict(text)
    return clip


def _load_vae(weights: dict[str, Tensor]) -> comfy.sd.VAE:
    """The host's VAE object around our autoencoder: it starts as the host's pixel-space one, then changes its model."""
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    autoencoder = Autoencoder().eval().requires_grad_(False)
    autoencoder.load_state_dict(_part(weights, "vae."))
    vae.first_stage_model = autoencoder
    vae.latent_channels = LatentFormat.latent_channels
    vae.downscale_ratio = vae.upscale_ratio = LatentFormat.spacial_downscale_ratio
    vae.vae_dtype = torch.float32
    vae.patcher = ModelPatcher(autoencoder, vae.device, comfy.model_management.vae_offload_device())
    return vae
