"""Latents to pictures, and pictures side by side."""

from __future__ import annotations

from pathlib import Path

import comfy.samplers
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor

from ..inversion.run import Guidance


def sample(model: ModelPatcher, guidance: Guidance, noise: Tensor, sigmas: Tensor) -> Tensor:
    """The host's euler sampler from noise latents [b, c, h, w], no noise added: image latents."""
    euler = comfy.samplers.sampler_object("euler")
    guider = guidance.guider(model)
    return guider.sample(torch.zeros_like(noise), noise, euler, sigmas, disable_pbar=True, seed=0).cpu()


def decode(vae, latent: Tensor) -> np.ndarray:
    """[b, H, W, 3] in [0, 1]."""
    return vae.decode(latent).float().numpy()


def save_grid(columns: list[np.ndarray], path: Path, scale: int = 3) -> None:
    """One row for each picture of the columns, each [b, H, W, 3] in [0, 1]."""
    grid = np.concatenate([np.concatenate(list(column)) for column in columns], 1)
    picture = Image.fromarray((grid.clip(0, 1) * 255).round().astype(np.uint8))
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS).save(path)
    print(f"pictures: {path}")
