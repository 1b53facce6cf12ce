"""Sampling a trajectory's image anew: its own noise, its own schedule, and another prompt or another MODEL."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..host.model import noise_latent
from ..host.trajectory import Trajectory
from .ddim import leading_sigmas
from .run import Guidance


def ddim_sigmas(model: ModelPatcher, steps: int) -> Tensor:
    """The schedule of the papers and of diffusers: [steps + 1] falling sigmas of the model's own table."""
    return leading_sigmas(model.get_model_object("model_sampling").sigmas.cpu(), steps)


def resample(model: ModelPatcher, trajectory: Trajectory, guidance: Guidance, sampler: str = "euler") -> Tensor:
    """Image latents [b, c, h, w], sampled by one of the host's samplers from where the trajectory starts."""
    noise = noise_latent(model, trajectory)
    return comfy.sample.sample_custom(
        model,
        torch.zeros_like(noise),
        guidance.cfg,
        comfy.samplers.sampler_object(sampler),
        trajectory.sigmas,
        guidance.positive,
        guidance.negative,
        noise,
        seed=0,
    )
