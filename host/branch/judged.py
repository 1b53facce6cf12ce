"""Guidance by a network that looks at the picture while it is sampled: the denoised estimate follows its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from comfy.clip_model import CLIPLayer
from comfy.clip_vision import ClipVisionModel
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, ResnetBlock, Upsample
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import Sampler
from comfy.sd import VAE
from comfy.taesd.taesd import Block
from torch import Tensor
from torch.nn.functional import interpolate

from ..run.model import add_outermost, check_noise_predicted
from ..run.refusals import OURS, check_judged
from ..run.schedule import fraction_of
from ..unet.gradients import OwnSums, checkpointed, gradients
from . import virtual

NODE = "CLIP Guidance"
KEY = f"{OURS}{NODE}"
LAYERS = (ResnetBlock, AttnBlock, Upsample, Block, CLIPLayer)  # of VAEs and CLIPs
# How many times the host's estimate for decoding an image the way back through VAE and CLIP needs, with checkpointing
# and without: what was counted for SD1.5 at 512 pixels and SDXL at 1024 fits into it.
HELD = {True: 1.5, False: 4}


class Rule(Protocol):
    def applies(self, fraction: float) -> bool:
        """At the step that starts where `fraction` (0 to 1) of the run is finished."""

    def guided(
        self, x: Tensor, denoised: Tensor, sigma: float, embed: Callable[[Tensor], Tensor], noised: bool
    ) -> Tensor:
        """The estimate [b, c, h, w] to go on with, given what the judge sees; called where autograd works.

        noised: whether the judge looks at the latent with its noise.
        """


class Judge(Protocol):
    """noised: whether it looks at x / sqrt(1 + sigma^2) rather than at the estimate.

    models: what has to be on its device while the MODEL runs.
    """

    noised: bool
    models: list[ModelPatcher]

    def check(self, channels: int, height: int, width: int) -> None:
        """Raises ValueError for latents that it cannot look at."""

    def memory(self, shape: Sequence[int]) -> float:
        """Bytes that a gradient for latents of this shape [b, c, h, w] needs, all of them at once."""

    def embed(self, base: BaseModel, latent: Tensor, sigma: float) -> Tensor:
        """[b, n], of latents [b, c, h, w] in sampler space."""


@dataclass(frozen=True)
class NoisedClip:
    """A CLIP that was trained on noise: its `image` takes latents of its `shape` [c, h, w] and their timesteps."""

    clip: ModelPatcher
    noised = True

    @property
    def models(self) -> list[ModelPatcher]:
        return [self.clip]

    def check(self, *shape: int) -> None:
        known = tuple(self.clip.model.shape)
        if shape != known:
            raise ValueError(
                f"The CLIP in noised_clip sees latents of {_told(known)}, but this run's are of {_told(shape)}: sample "
                f"Load Demo Model's MODEL, or connect clip, clip_vision and vae to {NODE} in place of noised_clip."
            )

    def memory(self, shape: Sequence[int]) -> float:
        """Next to nothing beside a row of the model that it was trained for."""
        return 0.0

    def embed(self, base: BaseModel, latent: Tensor, sigma: float) -> Tensor:
        timestep = base.model_sampling.timestep(latent.new_tensor(sigma))
        return self.clip.model.image(latent, timestep.expand(len(latent)))


@dataclass(frozen=True)
class Pictures:
    """An ordinary CLIP, which looks at the picture that the VAE makes of the estimate.

    checkpointing: whether each layer is run again for its gradient, instead of kept.
    """

    vae: VAE
    clip_vision: ClipVisionModel
    checkpointing: bool = True
    noised = False

    @property
    def models(self) -> list[ModelPatcher]:
        return [self.vae.patcher, self.clip_vision.patcher]

    def check(self, channels: int, *_: int) -> None:
        if channels != self.vae.latent_channels:
            raise ValueError(
                f"The vae of {NODE} decodes latents of {self.vae.latent_channels} channels, but this run's have "
                f"{channels}: connect the VAE that belongs to the MODEL."
            )

    def memory(self, shape: Sequence[int]) -> float:
        return shape[0] * HELD[self.checkpointing] * self.vae.memory_used_decode(shape, self.vae.vae_dtype)

    def embed(self, base: BaseModel, latent: Tensor, sigma: float) -> Tensor:
        """The host's own way, but for the rounding to 8 bits, which lets no gradient through."""
        vae, clip_vision = self.vae, self.clip_vision
        latent = base.process_latent_out(latent).to(vae.device, vae.vae_dtype)
        with ExitStack() as stack:
            if self.checkpointing:
                for network in (vae.first_stage_model, clip_vision.model):
                    stack.enter_context(checkpointed(network, LAYERS))
            pixels = vae.process_output(vae.first_stage_model.decode(latent).float())
            pixels = cropped(pixels.to(clip_vision.load_device), clip_vision.image_size)
            mean, deviation = (
                pixels.new_tensor(values).view(3, 1, 1) for values in (clip_vision.image_mean, clip_vision.image_std)
            )
            with OwnSums():
                return clip_vision.model(pixel_values=(pixels - mean) / deviation)[2].to(latent.device)


def attach_judge(model: ModelPatcher, rule: Rule, judge: Judge) -> ModelPatcher:
    """A clone of `model` whose guided estimate `rule` moves by what `judge` sees, whatever guider or edit made it.

    Several act one after the other. Runs reserve memory for the gradient. Raises ValueError for a model that predicts a
    flow.
    """
    check_noise_predicted(model, NODE)

    def prepare(executor, model: ModelPatcher, noise_shape: Sequence[int], *args, **kwargs):
        images, *shape = noise_shape
        rows = math.ceil(judge.memory(noise_shape) / model.model.memory_required([1, *shape]))
        return executor(model, [max(images, rows), *shape], *args, **kwargs)

    def outer_sample(executor, noise: Tensor, latent: Tensor, sampler: Sampler, *args, **kwargs):
        check_judged(NODE, virtual.KEY in executor.class_obj.model_options["transformer_options"])
        judge.check(*noise.shape[1:])
        return executor(noise, latent, sampler, *args, **kwargs)

    def predict_noise(executor, x: Tensor, timestep: Tensor, model_options: dict, *args, **kwargs) -> Tensor:
        denoised, sigma = executor(x, timestep, model_options, *args, **kwargs), float(timestep[0])
        if not rule.applies(fraction_of(model_options["transformer_options"]["sample_sigmas"], sigma)):
            return denoised
        base = executor.class_obj.inner_model
        with gradients():
            return rule.guided(x, denoised, sigma, lambda latent: judge.embed(base, latent, sigma), judge.noised)

    model = model.clone()
    model.set_additional_models(KEY, [*model.get_additional_models_with_key(KEY), *judge.models])
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, prepare)
    add_outermost(model, WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    add_outermost(model, WrappersMP.PREDICT_NOISE, KEY, predict_noise)
    return model


def cropped(pixels: Tensor, side: int) -> Tensor:
    """Pictures [b, 3, h, w] scaled until the shorter side fits, and their middle."""
    height, width = pixels.shape[2:]
    if (height, width) != (side, side):
        scale = side / min(height, width)
        size = (round(scale * height), round(scale * width))
        pixels = interpolate(pixels, size, mode="bicubic", antialias=True)
    top, left = ((length - side) // 2 for length in pixels.shape[2:])
    return pixels[:, :, top : top + side, left : left + side]


def _told(shape: tuple[int, ...]) -> str:
    channels, *sides = shape
    return f"{channels} channels and {' x '.join(map(str, sides))}"
