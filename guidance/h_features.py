"""Directions in h-space (h_space.py) on the host: mean features of the UNet along the way of two kinds of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..host.branch.call import POSITIVE, slice_of
from ..host.files.trajectory import Trajectory
from ..host.run.model import check_noise_predicted, identity
from ..host.run.refusals import (
    check_decoder,
    check_every_call,
    check_latent,
    check_same_model,
    check_unguided,
)
from ..host.run.sampler import OwnSampler, Run
from ..host.run.shortcuts import uncompiled
from ..host.unet.patches import with_decoded
from ..inversion.run import Guidance, check_unedited, sample
from .h_space import HDirection

KEY = "palimpsest.h_features"
PROMPTS, TRAJECTORIES = "H Space Direction from Prompts", "H Space Direction from Trajectories"


def direction_of_prompts(
    model: ModelPatcher,
    sources: Sequence[list],
    targets: Sequence[list],
    negative: list,
    cfg: float,
    sigmas: Tensor,
    noise: Tensor,
    block: int,
) -> HDirection:
    """What turns images that are sampled by the `sources` into those of the `targets`, both from the same noise.

    sources, targets: a conditioning for each image. noise: [images, c, h, w] of unit variance. block: the output block
    that takes the features in. Raises ValueError for models that have no such block, or that another node edits or
    guides.
    """
    _check(model, block, PROMPTS)
    check_latent(model, noise)

    starts = model.model.process_latent_out(noise * sigmas[0])

    def mean(prompts: Sequence[list]) -> Tensor:
        images = zip(prompts, starts.split(1), strict=True)
        runs = [_features(model, block, Guidance(prompt, negative, cfg), sigmas, start) for prompt, start in images]
        return torch.stack(runs).mean(0)

    return HDirection(mean(targets) - mean(sources), sigmas[:-1].clone(), identity(model), block)


def direction_of_trajectories(model: ModelPatcher, source: Trajectory, target: Trajectory, block: int) -> HDirection:
    """What turns the images of one trajectory into those of another, by each one's own prompt at its own states.

    Raises ValueError for models as `direction_of_prompts`, and for trajectories of other models or unlike schedules.
    """
    _check(model, block, TRAJECTORIES)
    for trajectory in (source, target):
        check_same_model(model, trajectory)
    if source.sigmas.shape != target.sigmas.shape or not torch.allclose(source.sigmas, target.sigmas, rtol=1e-4):
        raise ValueError(
            f"{TRAJECTORIES} was given trajectories of {source.steps} and {target.steps} steps from sigma "
            f"{float(source.sigmas[0]):.4g} and {float(target.sigmas[0]):.4g}: make both along one schedule."
        )
    if source.states.shape[2:] != target.states.shape[2:]:
        sizes = [f"{t.states.shape[-1]} x {t.states.shape[-2]}" for t in (source, target)]
        raise ValueError(
            f"{TRAJECTORIES} was given latents of {sizes[0]} and {sizes[1]}: scale the images to one size."
        )

    def mean(trajectory: Trajectory) -> Tensor:
        start, guidance = trajectory.states[0], Guidance(trajectory.conditioning)
        return _features(model, block, guidance, trajectory.sigmas, start, trajectory.states)

    return HDirection(mean(target) - mean(source), source.sigmas[:-1].clone(), identity(model), block)


def _check(model: ModelPatcher, block: int, node: str) -> None:
    check_decoder(model, block, node)
    check_noise_predicted(model, node)
    check_unedited(model, node)
    check_every_call(model, node)
    check_unguided(model)


def _features(
    model: ModelPatcher, block: int, guidance: Guidance, sigmas: Tensor, latent: Tensor, states: Tensor | None = None
) -> Tensor:
    """[n, c, h, w]: the images' mean features at each of falling sigmas [n + 1], of the positive prompt."""
    walk = _Walk(block, states)
    sample(walk.tapped(model), guidance, walk, sigmas, torch.zeros_like(latent), latent, seed=0)
    return torch.stack(walk.means)


class _Walk(OwnSampler):
    """Samples as euler does, or visits `states` [n + 1, b, c, h, w]; keeps the mean h of each step. Made anew for each
    run.
    """

    def __init__(self, block: int, states: Tensor | None) -> None:
        self.block, self.states = block, states
        self.h: Tensor | None = None  # of the last call
        self.means: list[Tensor] = []

    def tapped(self, model: ModelPatcher) -> ModelPatcher:
        def keep(h: Tensor, options: dict) -> Tensor:
            chunks = options["cond_or_uncond"]
            if POSITIVE in chunks:
                self.h = h[slice_of(h, chunks, chunks.index(POSITIVE))].to("cpu", torch.float32, copy=True)
            return h

        def tap(executor, inner, conds: list, x: Tensor, timestep: Tensor, model_options: dict):
            options = with_decoded(uncompiled(model_options["transformer_options"]), self.block, keep)
            return executor(inner, conds, x, timestep, {**model_options, "transformer_options": options})

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, tap)
        return model

    def walk(self, run: Run) -> Tensor:
        x = run.latent
        for i, sigma, sigma_next in run.steps():
            if self.states is not None:
                x = self.states[i].to(run.latent, copy=True)
            denoised = run.denoise(x, sigma)
            self.means.append(self.h.mean(0))
            run.report(i, denoised, x)
            x = denoised + sigma_next / sigma * (x - denoised)
        return x
