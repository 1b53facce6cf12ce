"""DiffEdit's mask (arXiv 2210.11427, section 3.2, step 1): where two prompts predict different noise in an image.

The image is noised to one level, with several noises. |eps(target) - eps(source)|, averaged over noises and channels,
is cut off at `ratio` times its mean and scaled to 0..1; what exceeds a threshold is where to edit. The paper's steps 2
and 3 are DDIM Inversion and Local Blend.

Guidance would multiply the difference by cfg, as both prompts have one negative, and the scaling divides it out again:
unlike in diffusers, the negative is not run. For the same reason the denoised estimates do for the noises, to which
they are proportional at one latent. Every image has its own mean; in diffusers a batch has one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import calc_cond_batch
from torch import Tensor

from ..host.run.memory import copies_at_once
from ..host.run.model import fitting
from ..host.run.refusals import check_every_call, check_latent
from ..host.run.sampler import OwnSampler, Run
from .run import Guidance, check_unedited, host_sample

NODE = "Difference Mask"
RATIO = 3.0  # times the mean difference, which counts as 1


class Settings(NamedTuple):
    """noise_level: the share of the schedule that the image is noised to, above 0 to 1. noises: how many are tried.

    ratio: times the mean, where differences are cut off.
    """

    noise_level: float
    noises: int
    ratio: float
    seed: int


def relevance(differences: Tensor, ratio: float) -> Tensor:
    """[b, h, w] in 0..1 from the differences of two predictions [n, b, c, (t,) h, w], of noise or denoised estimates.

    A video has one mask for all of its frames.
    """
    strength = differences.abs().flatten(2, -3).mean((0, 2))
    most = ratio * strength.mean((1, 2), keepdim=True)
    return (strength / most).clamp(max=1)


class RunRegion(NamedTuple):
    """That mask from the predictions of an edit's own first steps, each at a noise level of its own.

    threshold: of the relevance. until: the fraction of the run (0 to 1) whose steps count, at least the first.
    """

    threshold: float
    until: float

    def looks(self, fraction: float) -> bool:
        return fraction < self.until

    def found(self, differences: Tensor) -> Tensor:
        strong = (relevance(differences, RATIO) > self.threshold).to(differences)
        return strong[(slice(None), None, *[None] * (differences.ndim - 5))]


class DifferenceSampler(OwnSampler):
    """Asks for both prompts at the one sigma that it is given. Made anew for each run."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.differences: Tensor | None = None  # [n, b, c, (t,) h, w]

    def walk(self, run: Run) -> Tensor:
        image, model, noises = run.latent, run.guider.inner_model, self.settings.noises
        conds = [run.guider.conds[name] for name in ("positive", "negative")]
        generator = torch.Generator().manual_seed(self.settings.seed)
        noise = torch.randn((noises, 1, *image.shape[1:]), generator=generator).to(image)  # the same for all images
        found: list[Tensor] = []
        for part in noise.split(copies_at_once(model, image, noises)):
            clean = image.repeat(len(part), *[1] * (image.ndim - 1))
            sigmas = run.sigmas[:1].to(image).expand(len(clean))
            drawn = part.expand(-1, len(image), *part.shape[2:]).flatten(0, 1)
            x = model.model_sampling.noise_scaling(sigmas, drawn, clean)
            target, source = calc_cond_batch(model, conds, x, sigmas, run.model_options)
            found.append((target - source).unflatten(0, (len(part), len(image))))
            run.report(sum(map(len, found)) - 1, target[: len(image)], x[: len(image)], noises)
        self.differences = torch.cat(found)
        return self.differences.mean(0)


def difference_mask(model: ModelPatcher, source: list, target: list, samples: Tensor, settings: Settings) -> Tensor:
    """How far the prompts differ at each position of the image latents [b, c, (t,) h, w]: [b, h, w] in 0..1.

    Raises ValueError for models and latents that do not fit, and where the prompts do not differ at all.
    """
    check_unedited(model, NODE)
    check_every_call(model, NODE)
    samples = fitting(model, samples)
    check_latent(model, samples)
    sigma = model.get_model_object("model_sampling").percent_to_sigma(1 - settings.noise_level)
    sampler = DifferenceSampler(settings)
    sigmas = torch.tensor([sigma, 0.0])
    host_sample(model, Guidance(target, source), sampler, sigmas, torch.zeros_like(samples), samples, settings.seed)
    if not sampler.differences.flatten(2).any(2).any(0).all():
        raise ValueError(
            f"{NODE} finds no difference between source and target anywhere: connect two prompts that differ."
        )
    return relevance(sampler.differences, settings.ratio).cpu()
