"""The demo model that follows instructions: the host's InstructPix2Pix class around the demo UNet.

The file holds what was trained: the first convolution's part for the image's channels, two thin matrices for every
layer of the UNet and of the text encoder, and the tokens of the words that instructions bring.
"""

from __future__ import annotations

from pathlib import Path

import comfy.model_base
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .model import CHANNELS, WEIGHTS, Autoencoder, ModelConfig, load_clip, load_vae, part

INSTRUCT_WEIGHTS = Path(__file__).parent / "demo-instruct.safetensors"
FIRST = "input_blocks.0.0.weight"


class InstructConfig(ModelConfig):
    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__(autoencoder, 2 * CHANNELS)

    def get_model(
        self, state_dict: dict[str, Tensor], prefix: str = "", device: torch.device | None = None
    ) -> comfy.model_base.BaseModel:
        return comfy.model_base.SD15_instructpix2pix(self, self.model_type(state_dict, prefix), device)


def load_instruct(path: Path = INSTRUCT_WEIGHTS) -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """The model, its text encoder and the demo model's autoencoder as the host's objects, in fp32."""
    base, added = (comfy.utils.load_torch_file(str(file), safe_load=True) for file in (WEIGHTS, path))
    autoencoder = Autoencoder().eval().requires_grad_(False)
    autoencoder.load_state_dict(part(base, "vae."))
    weights = patched(base, added)
    config = InstructConfig(autoencoder)
    config.set_inference_dtype(torch.float32, None)
    offload_device = comfy.model_management.unet_offload_device()
    model = config.get_model(weights, device=offload_device)
    model.diffusion_model.load_state_dict(part(weights, "unet."))
    patcher = ModelPatcher(model, comfy.model_management.get_torch_device(), offload_device)
    return patcher, load_clip(weights), load_vae(autoencoder)


def patched(base: dict[str, Tensor], added: dict[str, Tensor]) -> dict[str, Tensor]:
    """The demo model's weights, in fp32, with what a file of this one adds to them."""
    weights = {key: value.float() if value.is_floating_point() else value for key, value in base.items()}
    for key in added:
        if key.endswith(".up"):
            name = f"{key.removesuffix('.up')}.weight"
            change = added[key].float() @ added[f"{key.removesuffix('.up')}.down"].float()
            weights[name] = weights[name] + change.view(weights[name].shape)
    weights[f"unet.{FIRST}"] = torch.cat([weights[f"unet.{FIRST}"], added["image"].float()], 1)
    weights["text.ids"] = torch.cat([weights["text.ids"], added["ids"]])
    weights["text.tokens"] = torch.cat([weights["text.tokens"], added["tokens"].float()])
    return weights
