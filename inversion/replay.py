"""Inversions whose image only a sampler of their own gives back: edit-friendly DDPM and EDICT on the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import Sampler
from torch import Tensor

from ..host.refusals import check_replay
from ..host.source import with_state
from ..host.trajectory import Trajectory
from . import edict
from .edict import Pair
from .edit_friendly import independent_states, posterior
from .run import Guidance, as_trajectory, check_inversion, denoiser, run

EDIT_FRIENDLY, EDICT = "Edit Friendly Inversion", "EDICT Inversion"


class EditFriendlySampler(Sampler):
    """Replays noise maps [b, c, h, w], one a step, from the trajectory's own start. Immutable."""

    def __init__(self, trajectory: Trajectory, maps: tuple[Tensor, ...], eta: float) -> None:
        self.trajectory, self.maps, self.eta = trajectory, maps, eta

    def sample(
        self,
        model_wrap,
        sigmas: Tensor,
        extra_args: dict,
        callback,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        check_replay(EDIT_FRIENDLY, self.trajectory, model_wrap.model_patcher, sigmas, latent_image, denoise_mask)
        denoise = denoiser(model_wrap, extra_args)
        x = self.trajectory.states[0].to(latent_image).expand_as(latent_image).clone()
        levels = sigmas.tolist()
        for i, (sigma, sigma_next) in enumerate(zip(levels, levels[1:], strict=False)):
            mean, spread, denoised = posterior(x, sigma, sigma_next, denoise, self.eta)
            x = mean + spread * self.maps[i].to(x)
            if callback is not None:
                callback(i, denoised, x, len(levels) - 1)
        return x


class EditFriendlyWalk(Sampler):
    """Finds the noise maps, walking from the noise to the image as their replay will. Made anew for each run."""

    def __init__(self, eta: float, seed: int) -> None:
        self.eta, self.seed = eta, seed
        self.states: list[Tensor] = []
        self.maps: list[Tensor] = []

    def sample(
        self,
        model_wrap,
        sigmas: Tensor,
        extra_args: dict,
        callback,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        denoise = denoiser(model_wrap, extra_args)
        x, *wanted = independent_states(latent_image, sigmas, self.seed)
        self.states.append(x.to("cpu", torch.float32))
        levels = sigmas.tolist()
        for i, (sigma, sigma_next) in enumerate(zip(levels, levels[1:], strict=False)):
            mean, spread, denoised = posterior(x, sigma, sigma_next, denoise, self.eta)
            self.maps.append(((wanted[i] - mean) / spread).to("cpu", torch.float32))
            x = mean + spread * self.maps[-1].to(x)  # as rounded in the replay, so that its errors do not add up
            self.states.append(x.to("cpu", torch.float32))
            if callback is not None:
                callback(i, denoised, x, len(levels) - 1)
        return x


def invert_edit_friendly(
    model: ModelPatcher, guidance: Guidance, samples: Tensor, sigmas: Tensor, eta: float, seed: int
) -> tuple[Trajectory, EditFriendlySampler]:
    """The independent states of image latents [b, c, h, w] at falling `sigmas`, the last above 0, and their replay.

    Raises ValueError for models, latents and settings that cannot be inverted.
    """
    check_inversion(EDIT_FRIENDLY, model, guidance, samples)
    walk = EditFriendlyWalk(eta, seed)
    run(model, guidance, walk, sigmas, torch.zeros_like(samples), samples, seed=0)
    trajectory = as_trajectory(model, guidance, walk.states, sigmas)
    return trajectory, EditFriendlySampler(trajectory, tuple(walk.maps), eta)


class EDICTSampler(Sampler):
    """Samples the coupled pair from where the inversion left it. Immutable.

    start: the pair in float64; the host's latent holds its x alone, and in less precision.
    seen: what the network saw of the source, two tensors [b, c, h, w] a step: its state for edits that read from it.
    """

    def __init__(self, trajectory: Trajectory, start: Pair, seen: tuple[Tensor, ...], mixing: float) -> None:
        self.trajectory, self.start, self.seen, self.mixing = trajectory, start, seen, mixing

    def sample(
        self,
        model_wrap,
        sigmas: Tensor,
        extra_args: dict,
        callback,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        check_replay(EDICT, self.trajectory, model_wrap.model_patcher, sigmas, latent_image, denoise_mask)
        source = iter(self.seen)

        def predict(x: Tensor, sigma: float) -> Tensor:
            options = with_state(extra_args["model_options"], next(source))
            return denoiser(model_wrap, {**extra_args, "model_options": options})(x, sigma)

        coupled = _Coupled(predict, latent_image)
        pair = Pair(*(part.expand(latent_image.shape) for part in self.start))
        levels = sigmas.tolist()
        for i, (sigma, sigma_next) in enumerate(zip(levels, levels[1:], strict=False)):
            pair = edict.step_down(pair, i, sigma, sigma_next, coupled.noise, self.mixing)
            if callback is not None:
                callback(i, coupled.denoised, pair.x, len(levels) - 1)
        return pair.x.to(latent_image)


class EDICTWalk(Sampler):
    """Takes the image, as both of the pair, up the schedule. Made anew for each run."""

    def __init__(self, mixing: float) -> None:
        self.mixing = mixing
        self.pair: Pair | None = None
        self.states: list[Tensor] = []
        self.seen: list[Tensor] = []

    def sample(
        self,
        model_wrap,
        sigmas: Tensor,
        extra_args: dict,
        callback,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        denoise = denoiser(model_wrap, extra_args)

        def predict(x: Tensor, sigma: float) -> Tensor:
            self.seen.append(x.cpu())
            return denoise(x, sigma)

        coupled = _Coupled(predict, latent_image)
        image = latent_image.cpu().double()
        self.pair = Pair(image, image)
        self.states.append(image.float())
        levels = sigmas.tolist()
        for i in reversed(range(len(levels) - 1)):
            self.pair = edict.step_up(self.pair, i, levels[i], levels[i + 1], coupled.noise, self.mixing)
            self.states.append(self.pair.x.float())
            if callback is not None:
                callback(len(levels) - 2 - i, coupled.denoised, self.pair.x, len(levels) - 1)
        return self.pair.x.to(latent_image)


def invert_edict(
    model: ModelPatcher, guidance: Guidance, samples: Tensor, sigmas: Tensor, mixing: float
) -> tuple[Trajectory, EDICTSampler]:
    """The x of the pair at each of the falling `sigmas` for image latents [b, c, h, w], and the coupled sampler.

    Raises ValueError for models, latents and settings that cannot be inverted.
    """
    check_inversion(EDICT, model, guidance, samples)
    walk = EDICTWalk(mixing)
    run(model, guidance, walk, sigmas, torch.zeros_like(samples), samples, seed=0)
    trajectory = as_trajectory(model, guidance, walk.states[::-1], sigmas)
    return trajectory, EDICTSampler(trajectory, walk.pair, tuple(walk.seen[::-1]), mixing)


class _Coupled:
    """The noise that the network sees, for a pair kept in float64: rounded the same way up and down, it is the same."""

    def __init__(self, predict: Callable[[Tensor, float], Tensor], like: Tensor) -> None:
        self.predict, self.like = predict, like
        self.denoised = like  # of the last call, for the preview

    def noise(self, x: Tensor, sigma: float) -> Tensor:
        x = x.to(self.like)
        self.denoised = self.predict(x, sigma)
        return ((x - self.denoised) / sigma).cpu().double()
