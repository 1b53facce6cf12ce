"""Inversions whose image only a sampler of their own gives back: edit-friendly DDPM, EDICT and O-BELM on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..host.branch.source import with_state
from ..host.files.trajectory import Trajectory
from ..host.run.model import check_noise_predicted
from ..host.run.refusals import check_replay, check_timesteps
from ..host.run.sampler import OwnSampler, Run
from . import edict, obelm
from .ddim import first_noise
from .ddim import step_up as ddim_step_up
from .edict import Pair
from .edit_friendly import independent_states, posterior
from .run import Guidance, as_trajectory, asked_twice, check_inversion, sample
from .turbo_edit import levels, limited, shifted_states

EDIT_FRIENDLY, EDICT, OBELM = "Edit Friendly Inversion", "EDICT Inversion", "OBELM Inversion"
FARTHEST = 1e12  # where float64, in which the pair is kept, holds no more than four decimals of the image


class EditFriendlySampler(OwnSampler):
    """Replays noise maps [b, c, h, w], one a step, from the trajectory's own start. Immutable."""

    def __init__(self, trajectory: Trajectory, maps: tuple[Tensor, ...], eta: float) -> None:
        self.trajectory, self.maps, self.eta = trajectory, maps, eta

    def walk(self, run: Run) -> Tensor:
        check_replay(EDIT_FRIENDLY, self.trajectory, run)
        denoise = asked_twice(run.denoise, f"The sampler of {EDIT_FRIENDLY}")
        x = self.trajectory.states[0].to(run.latent).expand_as(run.latent).clone()
        for i, sigma, sigma_next in run.steps():
            mean, denoised = posterior(x, sigma, sigma_next, denoise, self.eta)
            x = mean + self.maps[i].to(x)
            run.report(i, denoised, x)
        return x


class EditFriendlyWalk(OwnSampler):
    """Finds the noise maps, walking from the noise to the image as their replay will. Made anew for each run.

    states_of: the states of an image [b, c, h, w] at falling sigmas.
    """

    def __init__(self, eta: float, states_of: Callable[[Tensor, Tensor], list[Tensor]]) -> None:
        self.eta, self.states_of = eta, states_of
        self.states: list[Tensor] = []
        self.maps: list[Tensor] = []

    def walk(self, run: Run) -> Tensor:
        denoise = asked_twice(run.denoise, EDIT_FRIENDLY)
        x, *wanted = self.states_of(run.latent, run.sigmas)
        self.states.append(x.to("cpu", torch.float32))
        for i, sigma, sigma_next in run.steps():
            mean, denoised = posterior(x, sigma, sigma_next, denoise, self.eta)
            self.maps.append((wanted[i] - mean).to("cpu", torch.float32))
            x = mean + self.maps[-1].to(x)  # as rounded in the replay, so that its errors do not add up
            self.states.append(x.to("cpu", torch.float32))
            run.report(i, denoised, x)
        return x


def invert_edit_friendly(
    model: ModelPatcher, guidance: Guidance, samples: Tensor, sigmas: Tensor, eta: float, seed: int
) -> tuple[Trajectory, EditFriendlySampler]:
    """The independent states of image latents [b, c, h, w] at falling `sigmas`, the last above 0, and their replay.

    Raises ValueError for models, latents and settings that cannot be inverted.
    """
    walk = EditFriendlyWalk(eta, partial(independent_states, seed=seed))
    trajectory = _walked(model, guidance, samples, sigmas, walk)
    return trajectory, EditFriendlySampler(trajectory, tuple(walk.maps), eta)


def invert_turbo_edit(
    model: ModelPatcher, source: list, samples: Tensor, steps: int, seed: int
) -> tuple[Trajectory, EditFriendlySampler]:
    """As invert_edit_friendly, by the shifted states at the labels of TurboEdit's `steps` steps (turbo_edit.py).

    source: the prompt that says what the image shows. Raises ValueError for models and latents that cannot be inverted.
    """
    check_noise_predicted(model, EDIT_FRIENDLY)
    check_timesteps(model, "TurboEdit")
    shifted = levels(model.get_model_object("model_sampling").sigmas.cpu(), steps)
    walk = EditFriendlyWalk(1.0, lambda image, _: shifted_states(image, shifted, seed))
    trajectory = _walked(model, Guidance(source), samples, shifted.labels, walk)
    *maps, last = walk.maps
    return trajectory, EditFriendlySampler(trajectory, (*maps, limited(last)), 1.0)


def _walked(
    model: ModelPatcher, guidance: Guidance, samples: Tensor, sigmas: Tensor, walk: EditFriendlyWalk
) -> Trajectory:
    check_inversion(EDIT_FRIENDLY, model, guidance, samples)
    sample(model, guidance, walk, sigmas, torch.zeros_like(samples), samples, seed=0)
    return as_trajectory(model, guidance, walk.states, sigmas)


class EDICTSampler(OwnSampler):
    """Samples the coupled pair from where the inversion left it. Immutable.

    start: the pair in float64; the host's latent holds its x alone, and in less precision.
    seen: what the network saw of the source, two tensors [b, c, h, w] a step: its state for edits that read from it.
    """

    def __init__(self, trajectory: Trajectory, start: Pair, seen: tuple[Tensor, ...], mixing: float) -> None:
        self.trajectory, self.start, self.seen, self.mixing = trajectory, start, seen, mixing

    def walk(self, run: Run) -> Tensor:
        check_replay(EDICT, self.trajectory, run)
        source, denoise = iter(self.seen), asked_twice(run.denoise, f"The sampler of {EDICT}")

        def predict(x: Tensor, sigma: float) -> Tensor:
            return denoise(x, sigma, model_options=with_state(run.model_options, next(source)))

        coupled = _Coupled(predict, run.latent)
        pair = Pair(*(part.expand(run.latent.shape) for part in self.start))
        for i, sigma, sigma_next in run.steps():
            pair = edict.step_down(pair, i, sigma, sigma_next, coupled.noise, self.mixing)
            run.report(i, coupled.denoised, pair.x)
        return pair.x.to(run.latent)


class EDICTWalk(OwnSampler):
    """Takes the image, as both of the pair, up the schedule. Made anew for each run."""

    def __init__(self, mixing: float) -> None:
        self.mixing = mixing
        self.pair: Pair | None = None
        self.states: list[Tensor] = []
        self.seen: list[Tensor] = []

    def walk(self, run: Run) -> Tensor:
        denoise = asked_twice(run.denoise, EDICT)

        def predict(x: Tensor, sigma: float) -> Tensor:
            self.seen.append(x.cpu())
            return denoise(x, sigma)

        coupled = _Coupled(predict, run.latent)
        image = run.latent.cpu().double()
        self.pair = Pair(image, image)
        self.states.append(image.float())
        for done, (i, sigma, sigma_next) in enumerate(reversed([*run.steps()])):
            self.pair = edict.step_up(self.pair, i, sigma, sigma_next, coupled.noise, self.mixing)
            if self.pair.x.abs().max() > FARTHEST:
                raise ValueError(
                    f"EDICT Inversion drives its copies out of bounds at mixing {self.mixing:g}, in step {done + 1} "
                    f"of {len(run.sigmas) - 1}: raise mixing (paper: 0.93), or lower steps or strength."
                )
            self.states.append(self.pair.x.float())
            run.report(done, coupled.denoised, self.pair.x)
        return self.pair.x.to(run.latent)


def invert_edict(
    model: ModelPatcher, guidance: Guidance, samples: Tensor, sigmas: Tensor, mixing: float
) -> tuple[Trajectory, EDICTSampler]:
    """The x of the pair at each of the falling `sigmas` for image latents [b, c, h, w], and the coupled sampler.

    Raises ValueError for models, latents and settings that cannot be inverted.
    """
    check_inversion(EDICT, model, guidance, samples)
    walk = EDICTWalk(mixing)
    sample(model, guidance, walk, sigmas, torch.zeros_like(samples), samples, seed=0)
    trajectory = as_trajectory(model, guidance, walk.states[::-1], sigmas)
    return trajectory, EDICTSampler(trajectory, walk.pair, tuple(walk.seen[::-1]), mixing)


class OBELMSampler(OwnSampler):
    """Samples from the two noisiest states of the inversion, as if the edit had come by them too. Immutable.

    start: these states in float64, the noisier first; the host's latent holds that alone, and in less precision.
    """

    def __init__(self, trajectory: Trajectory, start: tuple[Tensor, Tensor]) -> None:
        self.trajectory, self.start = trajectory, start

    def walk(self, run: Run) -> Tensor:
        check_replay(OBELM, self.trajectory, run)
        denoise = asked_twice(run.denoise, f"The sampler of {OBELM}")
        before, x = (state.expand(run.latent.shape) for state in self.start)
        *_, last = _two_steps(run, denoise, run.sigmas.tolist(), before, x)
        return last.to(run.latent)


class OBELMWalk(OwnSampler):
    """Takes the image up the schedule, the first step by DDIM inversion. Made anew for each run."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []  # in float64

    def walk(self, run: Run) -> Tensor:
        denoise, levels = asked_twice(run.denoise, OBELM), run.sigmas.tolist()[::-1]
        eps = first_noise(run.latent, levels[0], levels[1], denoise)
        x, denoised = ddim_step_up(run.latent, levels[0], levels[1], eps)
        run.report(0, denoised, x)
        self.states += [run.latent.cpu().double(), x.cpu().double()]
        self.states += _two_steps(run, denoise, levels, *self.states)
        return self.states[-1].to(run.latent)


def invert_obelm(
    model: ModelPatcher, guidance: Guidance, samples: Tensor, sigmas: Tensor
) -> tuple[Trajectory, OBELMSampler]:
    """The states at each of three or more falling `sigmas`, the last above 0, for image latents, and their sampler.

    samples: [b, c, h, w]. Raises ValueError for models, latents and settings that cannot be inverted.
    """
    check_inversion(OBELM, model, guidance, samples)
    walk = OBELMWalk()
    sample(model, guidance, walk, sigmas, torch.zeros_like(samples), samples, seed=0)
    trajectory = as_trajectory(model, guidance, [state.float() for state in walk.states[::-1]], sigmas)
    return trajectory, OBELMSampler(trajectory, (walk.states[-1], walk.states[-2]))


def _two_steps(
    run: Run, denoise: Callable[[Tensor, float], Tensor], levels: list[float], before: Tensor, x: Tensor
) -> Iterator[Tensor]:
    """The states in float64 after these two, at the third and each further of `levels`, which rise or fall."""
    for i, (sigma_before, sigma, sigma_next) in enumerate(zip(levels, levels[1:], levels[2:], strict=False)):
        shown = x.to(run.latent)
        moved = shown.clone()
        denoised = denoise(moved, sigma)
        x = x + (moved - shown).cpu().double()  # Local Blend changes what the network is shown
        eps = ((moved - denoised) / sigma).cpu().double()
        before, x = x, obelm.step(before, x, eps, sigma_before, sigma, sigma_next)
        run.report(i + 1, denoised, x)
        yield x


class _Coupled:
    """The noise that the network sees, for a pair kept in float64: rounded the same way up and down, it is the same."""

    def __init__(self, predict: Callable[[Tensor, float], Tensor], like: Tensor) -> None:
        self.predict, self.like = predict, like
        self.denoised = like  # of the last call, for the preview

    def noise(self, x: Tensor, sigma: float) -> Tensor:
        x = x.to(self.like)
        self.denoised = self.predict(x, sigma)
        return ((x - self.denoised) / sigma).cpu().double()
