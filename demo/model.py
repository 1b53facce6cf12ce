"""The embedded demo model in the host's own classes: an SD1.5-like UNet, a CLIP text encoder and an autoencoder.

The UNet and the text encoder are laid out as SD1.5's are, only smaller; the UNet predicts v. Latents are the principal
components of 8 x 8 patches, so encoding is linear and in closed form; a small decoder adds to their linear inverse what
they leave out. One fp16 safetensors file holds all of it.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import comfy.controlnet
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from torch import Tensor, nn

from .tokenizer import DemoTokenizer

WEIGHTS = Path(__file__).parent / "demo-model.safetensors"
LCM_WEIGHTS = Path(__file__).parent / "demo-lcm.safetensors"
INPAINT_WEIGHTS = Path(__file__).parent / "demo-inpaint.safetensors"
CONTROL_WEIGHTS = Path(__file__).parent / "demo-control.safetensors"

SIZE = 128  # pixels a side
PATCH = 8  # pixels a side that one latent position stands for
CHANNELS = 16
INPAINT_CHANNELS = 2 * CHANNELS + 1  # the latent, a mask, and the latent of the picture without what the mask hides
FIRST = "input_blocks.0.0"  # the UNet's first convolution

UNET = {
    "image_size": SIZE // PATCH,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
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
    "context_dim": 128,
    "adm_in_channels": None,
    "legacy": False,
}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
DECODER_WIDTHS = (128, 64, 32)  # at 1/8, 1/4 and 1/2 of the picture's side


class Autoencoder(nn.Module):
    """Pixels [b, 3, 128, 128] in [-1, 1] to latents [b, 16, 16, 16] and back.

    `basis` [16, 192] holds the patch that each channel adds to the mean patch; encoding is its pseudo-inverse.
    """

    def __init__(self) -> None:
        super().__init__()
        patch = 3 * PATCH**2
        self.register_buffer("mean", torch.zeros(patch))
        self.register_buffer("basis", torch.eye(CHANNELS, patch))
        self.decoder = decoder()

    def encode(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        if (height, width) != (SIZE, SIZE):
            raise ValueError(
                f"The demo model takes pictures of {SIZE} x {SIZE} pixels, not {width} x {height}: scale or crop the "
                "image before VAE Encode."
            )
        patches = rearrange(pixels, "b c (h i) (w j) -> b h w (c i j)", i=PATCH, j=PATCH)
        return ((patches - self.mean) @ torch.linalg.pinv(self.basis)).movedim(-1, 1)

    def decode(self, latent: Tensor) -> Tensor:
        side = SIZE // PATCH
        if latent.shape[1:] != (CHANNELS, side, side):
            channels, height, width = latent.shape[1:]
            raise ValueError(
                f"The demo model's VAE decodes latents of {CHANNELS} channels and {side} x {side}, not of {channels} "
                f"channels and {width} x {height}: connect the VAE of the model that made the latent, and give Load "
                f"Demo Model's pictures of {SIZE} x {SIZE} pixels."
            )
        return self.linear(latent) + self.decoder(latent)

    def linear(self, latent: Tensor) -> Tensor:
        """The picture as far as the latent tells it: `encode` takes it back to the very same latent."""
        patches = latent.movedim(1, -1) @ self.basis + self.mean
        return rearrange(patches, "b h w (c i j) -> b c (h i) (w j)", i=PATCH, j=PATCH)


def decoder() -> nn.Sequential:
    """What the linear decoding lacks: residual blocks at growing size, the last doubling without any."""
    layers, width = [], CHANNELS
    for next_width in DECODER_WIDTHS:
        if layers:
            layers += [nn.Conv2d(width, 4 * next_width, 3, padding=1), nn.PixelShuffle(2)]
        else:
            layers += [nn.Conv2d(width, next_width, 3, padding=1)]
        layers += [_Residual(next_width), _Residual(next_width)]
        width = next_width
    layers += [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 3 * 4, 3, padding=1), nn.PixelShuffle(2)]
    return nn.Sequential(*layers)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(2)]
        self.layers = nn.Sequential(*layers[0], *layers[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class LatentFormat(comfy.latent_formats.LatentFormat):
    """Latents as the autoencoder makes them; previews show the mean colour of every patch, which is linear in them."""

    latent_channels = CHANNELS
    spacial_downscale_ratio = PATCH

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.latent_rgb_factors = autoencoder.basis.unflatten(1, (3, -1)).mean(-1).tolist()
        self.latent_rgb_factors_bias = autoencoder.mean.unflatten(0, (3, -1)).mean(-1).tolist()


class ModelConfig(comfy.supported_models_base.BASE):
    unet_extra_config = {}  # the host's default would overrule the attention heads of UNET
    memory_usage_factor = 1.0

    def __init__(self, autoencoder: Autoencoder, channels: int = CHANNELS) -> None:
        super().__init__(copy.deepcopy(UNET) | {"in_channels": channels})
        self.latent_format = LatentFormat(autoencoder)
        self.grey = autoencoder.encode(torch.zeros(1, 3, SIZE, SIZE))

    def get_model(
        self, state_dict: dict[str, Tensor], prefix: str = "", device: torch.device | None = None
    ) -> comfy.model_base.BaseModel:
        model = super().get_model(state_dict, prefix, device)
        if self.inpaint_model():  # what it sees where it is told nothing: all of the picture hidden
            model.blank_inpaint_image_like = lambda latent: self.grey.to(latent).expand_as(latent)
        return model

    def model_type(self, state_dict: dict[str, Tensor], prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.V_PREDICTION

    def inpaint_model(self) -> bool:
        return self.unet_config["in_channels"] > CHANNELS


def load(path: Path = WEIGHTS, few_steps: bool = False) -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """The model, its text encoder and its autoencoder as the host's objects, in fp32.

    few_steps: with the LoRA that samples it in 4 to 8 steps without guidance.
    """
    weights = comfy.utils.load_torch_file(str(path), safe_load=True)
    autoencoder = _load_autoencoder(weights)
    unet = _load_unet(weights, autoencoder)
    if few_steps:
        lora = comfy.utils.load_torch_file(str(LCM_WEIGHTS), safe_load=True)
        unet, _ = comfy.sd.load_lora_for_models(unet, None, lora, 1.0, 0.0)
    return unet, load_clip(weights), load_vae(autoencoder)


def load_inpaint(path: Path = INPAINT_WEIGHTS) -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """As `load`, with the further input channels of an inpainting checkpoint and the LoRA that was trained for them."""
    weights = comfy.utils.load_torch_file(str(WEIGHTS), safe_load=True)
    weights[f"unet.{FIRST}.weight"] = widened(weights[f"unet.{FIRST}.weight"])
    autoencoder = _load_autoencoder(weights)
    added = comfy.utils.load_torch_file(str(path), safe_load=True)
    unet, _ = comfy.sd.load_lora_for_models(_load_unet(weights, autoencoder), None, added, 1.0, 0.0)
    return unet, load_clip(weights), load_vae(autoencoder)


def load_control() -> comfy.controlnet.ControlLora:
    """A ControlNet for edges. The host builds it at each run from the model that it controls, which `load` gives."""
    return comfy.controlnet.load_controlnet(str(CONTROL_WEIGHTS))


def widened(weight: Tensor) -> Tensor:
    """The first convolution's weight with zeros for what an inpainting model sees beside the latent."""
    return torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, INPAINT_CHANNELS - CHANNELS))


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value.float() for key, value in weights.items() if key.startswith(prefix)}


def _load_autoencoder(weights: dict[str, Tensor]) -> Autoencoder:
    autoencoder = Autoencoder().eval().requires_grad_(False)
    autoencoder.load_state_dict(part(weights, "vae."))
    return autoencoder


def _load_unet(weights: dict[str, Tensor], autoencoder: Autoencoder) -> ModelPatcher:
    config = ModelConfig(autoencoder, weights[f"unet.{FIRST}.weight"].shape[1])
    config.set_inference_dtype(torch.float32, None)
    offload_device = comfy.model_management.unet_offload_device()
    model = config.get_model(weights, device=offload_device)
    model.diffusion_model.load_state_dict(part(weights, "unet."))
    return ModelPatcher(model, comfy.model_management.get_torch_device(), offload_device)


def load_clip(weights: dict[str, Tensor]) -> comfy.sd.CLIP:
    tokenizer = partial(DemoTokenizer, weights["text.ids"].tolist())
    target = comfy.supported_models_base.ClipTarget(tokenizer, comfy.sd1_clip.SD1ClipModel)
    clip = comfy.sd.CLIP(target, model_options={"clip_l_model_config": TEXT, "dtype": torch.float32})
    text = part(weights, "text.model.")
    tokens = weights["text.tokens"].float()
    # Only the words of scene captions were trained; every other token is their mean.
    table = tokens.mean(0).repeat(clip.cond_stage_model.clip_l.transformer.get_input_embeddings().num_embeddings, 1)
    table[weights["text.ids"].long()] = tokens
    text["embeddings.token_embedding.weight"] = table
    transformer = clip.cond_stage_model.clip_l.transformer
    transformer.text_model.load_state_dict(text)
    torch.nn.init.eye_(
        transformer.text_projection.weight
    )  # nothing was trained on it: the host leaves it as it finds it
    return clip


def load_vae(autoencoder: Autoencoder) -> comfy.sd.VAE:
    """The host's VAE object around our autoencoder: it starts as the host's pixel-space one, then changes its model."""
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    vae.first_stage_model = autoencoder
    vae.latent_channels = CHANNELS
    vae.downscale_ratio = vae.upscale_ratio = PATCH
    vae.vae_dtype = torch.float32
    vae.patcher = ModelPatcher(autoencoder, vae.device, comfy.model_management.vae_offload_device())
    return vae
