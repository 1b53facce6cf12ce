"""A flow-matching demo model in the host's own Flux class, beside the UNet: same latents, same text encoder.

It is laid out as Flux schnell is, only smaller: no guidance embedding, patches of 2 x 2 latent positions, double blocks
and then single ones. It reads the first tokens of the demo text encoder's conditioning, as many as a caption can have,
and the end token's embedding in the place of a pooled output. Its file holds nothing but the denoiser.
"""

from __future__ import annotations

import copy
from pathlib import Path

import comfy.conds
import comfy.model_base
import comfy.model_management
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .model import CHANNELS, TEXT, WEIGHTS, Autoencoder, LatentFormat, part
from .scenes import MOST_WORDS

FLOW_WEIGHTS = Path(__file__).parent / "demo-flow.safetensors"

TEXT_TOKENS = MOST_WORDS + 2  # a caption's words between start and end; what follows is padding
HEAD = 32  # channels of an attention head

FLUX = {
    "image_model": "flux",
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "patch_size": 2,
    "vec_in_dim": TEXT["hidden_size"],
    "context_in_dim": TEXT["hidden_size"],
    "hidden_size": 128,
    "num_heads": 4,
    "mlp_ratio": 4.0,
    "depth": 3,
    "depth_single_blocks": 6,
    "axes_dim": [8, 12, 12],
    "theta": 100,  # a picture is 8 x 8 tokens
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}


class FlowModel(comfy.model_base.Flux):
    """The host's Flux, which cuts a conditioning of 77 tokens to those that it was trained on."""

    def extra_conds(self, **options) -> dict:
        if options.get("cross_attn") is not None:
            options["cross_attn"] = options["cross_attn"][:, :TEXT_TOKENS]
        return super().extra_conds(**options | {"guidance": None})


class FlowConfig(comfy.supported_models_base.BASE):
    unet_extra_config = {}  # the host's default would add attention heads
    sampling_settings = {"multiplier": 1.0, "shift": 1.0}  # schnell's: the network sees the noise level itself
    memory_usage_factor = 1.0

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__(copy.deepcopy(FLUX))
        self.latent_format = LatentFormat(autoencoder)

    def get_model(
        self, state_dict: dict[str, Tensor], prefix: str = "", device: torch.device | None = None
    ) -> FlowModel:
        return FlowModel(self, comfy.model_base.ModelType.FLOW, device)

    def inpaint_model(self) -> bool:
        return False


def load_flow(path: Path = FLOW_WEIGHTS, rest: Path = WEIGHTS) -> ModelPatcher:
    """The flow model as the host's MODEL, in fp32.

    It goes with the CLIP and the VAE of `model.load()`, whose weights are in the file `rest`: CLIP Text Encode,
    KSampler and VAE Decode work on the three as on any model. Velocities are noise - image, x = sigma * noise + (1 -
    sigma) * image.
    """
    autoencoder = Autoencoder()
    autoencoder.load_state_dict(part(comfy.utils.load_torch_file(str(rest), safe_load=True), "vae."))
    config = FlowConfig(autoencoder)
    config.set_inference_dtype(torch.float32, None)
    offload_device = comfy.model_management.unet_offload_device()
    model = config.get_model({}, device=offload_device)
    model.diffusion_model.load_state_dict(part(comfy.utils.load_torch_file(str(path), safe_load=True), ""))
    return ModelPatcher(model, comfy.model_management.get_torch_device(), offload_device)
