"""Editing without inversion: the sampler is told that the image, moved by the difference of two predictions, is there.

Let x be the target's latent, d how far it is from the source's, and Delta = D(x; target) - D(x - d; source) the
difference of their denoised estimates. A step of every method of this family takes d to kept d + taken Delta, and the
edit is the image plus d. Where the model's answer is image + Delta, that is what the host's own samplers do to x:
`lcm` with kept 0, `euler` with t / s and `euler_ancestral` with (t / s)^2 for a step from sigma s to t. Taken is 1 less
kept, both times what the image has lost where a flow adds noise. What is left is to follow d, and to run the source at
x - d, the image with the sampler's own noise on it, or at the state that a trajectory has there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import KSAMPLER, CFGGuider, Sampler
from torch import Tensor

from ..files.trajectory import Trajectory
from ..run.model import add_outermost, is_flow, noised
from ..run.refusals import check_followed, check_follows, check_image_run
from ..run.sampler import function_name, settings
from ..run.schedule import step_of
from . import guided, source

KEY = f"{source.KEY}.virtual"


class Path(Enum):
    """Where the source is at a sigma: the image with the sampler's own noise on it, or with noise drawn anew for every
    step but the first, or where the trajectory has it.
    """

    SAMPLED, FRESH, FOLLOWED = range(3)


class Region(Protocol):
    """Where the two predictions differ, found in the first steps of a run."""

    def looks(self, fraction: float) -> bool:
        """Whether the step that starts where `fraction` (0 to 1) of the run is finished adds to what is known."""

    def found(self, differences: Tensor) -> Tensor:
        """[b, 1, (1,) h, w], 1 where to edit and 0 where not, from the differences of the steps [n, b, c, (t,) h, w].

        They are Delta without guidance, by which the two would differ everywhere. It is how far the edit is to go; less
        d, it would be how the model denoises what has moved already.
        """


@dataclass(frozen=True)
class Virtual:
    """What a MODEL carries beside its source branch. Immutable; the state of a run is in `_Run`.

    node: the display name of the node that made it.
    samples: [b, c, (t,) h, w], the image as the host's latent. mask: its noise mask, or None.
    path: where the source is at a sigma.
    cfg: the guidance of the source's prediction, by the sampler's negative prompt.
    pull: how much of Delta each step takes back.
    region: outside which d is 0 from the step on at which it is known; None to edit everywhere.
    """

    node: str
    samples: Tensor
    mask: Tensor | None
    path: Path
    cfg: float = 1.0
    pull: float = 0.0
    region: Region | None = None


def attach_virtual(model: ModelPatcher, trajectory: Trajectory, virtual: Virtual) -> ModelPatcher:
    """A clone of `model` whose samples are edits of the image at the end of `trajectory`.

    Raises ValueError as `source.attach`.
    """
    model, branch = source.branched(model, trajectory)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
    # Around what else guides, so that its part is in Delta; Proximal Guidance stays around all.
    add_outermost(model, WrappersMP.PREDICT_NOISE, KEY, _predict_noise, within=guided.KEY)
    branch = replace(branch, virtual=True, cfg=virtual.cfg)
    model.model_options["transformer_options"] |= {source.KEY: branch, KEY: virtual}
    return model


def virtual_of(model: ModelPatcher) -> Virtual | None:
    return model.model_options["transformer_options"].get(KEY)


Mix = Callable[[float, float], tuple[float, float]]
"""How much a step from one sigma to the next keeps of the latent and takes of the model's answer, 0 to 1 each."""


def mix_of(sampler: Sampler, flow: bool) -> Mix | None:
    """What a sampler's step is beside its noise, of a model that predicts a flow or not; None where no such mixture."""
    if not isinstance(sampler, KSAMPLER):
        return None
    name, options = function_name(sampler), settings(sampler)
    if name == "sample_euler" and options.get("s_churn", 0) > 0:
        return None
    eta = options.get("eta", 1.0)

    def kept(share: float, scale: float = 1.0) -> tuple[float, float]:
        return scale * share, scale * (1 - share)

    def ancestral(sigma: float, below: float) -> tuple[float, float]:
        added = min(below, eta * below * max(1 - (below / sigma) ** 2, 0) ** 0.5)
        return kept((below**2 - added**2) ** 0.5 / sigma)

    def flow_ancestral(sigma: float, below: float) -> tuple[float, float]:
        down = below * (1 + (below / sigma - 1) * eta)
        return kept(down / sigma, (1 - below) / (1 - down) if eta > 0 else 1.0)

    known: dict[str, Mix] = {
        "sample_lcm": lambda sigma, below: kept(0.0, 1 - below if flow else 1.0),
        "sample_euler": lambda sigma, below: kept(below / sigma),
        "sample_euler_ancestral": flow_ancestral if flow else ancestral,
    }
    if not flow:
        known["sample_ddpm"] = lambda sigma, below: kept((below / sigma) ** 2)
    return known.get(name)


class _Run:
    """How far the target of one sampling run is from its source, followed from call to call.

    image: [1 or b, c, (t,) h, w] in sampler space.
    """

    def __init__(
        self,
        virtual: Virtual,
        model: ModelPatcher,
        trajectory: Trajectory,
        images: int,
        sigmas: Tensor,
        mix: Mix,
        mask: Tensor | None,
        seed: int,
    ) -> None:
        self.model, self.trajectory, self.image = model, trajectory, trajectory.states[-1].to(model.load_device)
        self.path, self.pull, self.sigmas, self.mix, self.mask = virtual.path, virtual.pull, sigmas, mix, mask
        # The run's own noise has been drawn by the seed.
        self.generator = torch.Generator().manual_seed((seed + 1) % 2**64)
        self.noise: Tensor | None = None  # in place of the sampler's
        self.sigma = float(sigmas[0])
        self.moved = self.image.new_zeros(images, *self.image.shape[1:])  # d
        self.answered = self.moved  # Delta of the last call
        self.region = virtual.region
        self.differences: list[Tensor] = []  # of the steps at which the region looks
        self.found: Tensor | None = None  # the region, once it is known

    def reach(self, sigma: float, mask: Tensor | None) -> Tensor:
        """d at `sigma`, where the step that ends there is taken. mask: of the host, which puts the image back."""
        if sigma < self.sigma:
            kept, taken = self.mix(self.sigma, sigma)
            self.moved = kept * self.moved + taken * self.answered
            self.moved = self.moved if mask is None else self.moved * mask
            self.sigma = sigma
            if self.path is Path.FRESH:
                self.noise = torch.randn(self.image.shape, generator=self.generator).to(self.image)
        return self.moved

    def confined(self, moved: Tensor) -> Tensor:
        """d or Delta within the region that was found; outside the sampler's own d only fades."""
        return moved if self.found is None else moved * self.found

    def look(self, apart: Tensor) -> None:
        """Notes the difference of the two estimates at a step, and finds the region at the last such step."""
        if self.region is None or self.found is not None:
            return
        self.differences.append(apart)
        if not self.region.looks((step_of(self.sigmas, self.sigma) + 1) / (len(self.sigmas) - 1)):
            self.found = self.region.found(torch.stack(self.differences))

    def states(self, x: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """The source's latent [1 or b, c, (t,) h, w] and the target's [b, c, (t,) h, w] for the sampler's x.

        Targets of one image share its noise, and so one source.
        """
        if self.path is Path.FOLLOWED:
            state = self.trajectory.states[self.trajectory.index(self.sigma)].to(x)
        elif self.noise is not None:
            state = noised(self.model, self.image, self.noise, self.sigma)
        elif len(self.image) == len(x) and self.found is None:
            return x - moved, x
        else:
            state = (x - moved)[: len(self.image)]
        return state, state + self.confined(moved)

    def answer(self, difference: Tensor, mask: Tensor | None) -> Tensor:
        """Delta as the sampler is to take it, from the difference of the two predictions."""
        if self.pull:
            step = step_of(self.sigmas, self.sigma)
            _, taken = self.mix(self.sigma, float(self.sigmas[step + 1]))
            difference = difference * (1 - self.pull / taken)
        difference = difference if mask is None else difference * mask
        self.answered = self.confined(difference)
        return self.answered

    def masked(self, guider: CFGGuider, model_options: dict, timestep: Tensor) -> Tensor | None:
        """The noise mask of a call, which Differential Diffusion changes from call to call."""
        change = model_options.get("denoise_mask_function")
        if self.mask is None or change is None:
            return self.mask
        return change(timestep, self.mask, extra_options={"model": guider, "sigmas": self.sigmas})


def _outer_sample(
    executor, noise: Tensor, latent: Tensor, sampler: Sampler, sigmas: Tensor, mask, callback, quiet, seed, **kwargs
):
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]  # the host's copy for this run alone
    virtual, trajectory = options[KEY], options[source.KEY].trajectory
    image = trajectory.states[-1]
    mix = mix_of(sampler, is_flow(guider.model_patcher))
    check_follows(virtual.node, sampler, mix is not None)
    needs_noise = virtual.path is not Path.FOLLOWED
    check_image_run(virtual.node, guider, image, noise, latent, sigmas, mask, needs_noise)
    if virtual.path is Path.FOLLOWED:
        check_followed(trajectory, sigmas)
    run = _Run(virtual, guider.model_patcher, trajectory, len(latent), sigmas, mix, mask, seed or 0)
    options[KEY] = run
    result = executor(noise, latent, sampler, sigmas, mask, callback, quiet, seed, **kwargs)
    moved = run.confined(run.reach(float(sigmas[-1]), None))
    edited = guider.model_patcher.model.process_latent_out(run.image + moved).to(result)
    # Through the model's own scale and back an image is not the same to the last bit.
    return torch.where(moved.to(result) == 0, latent.to(result), edited)


def _predict_noise(executor, x: Tensor, timestep: Tensor, model_options: dict, *args, **kwargs) -> Tensor:
    options = model_options["transformer_options"]
    run, branch = options[KEY], options[source.RUN]
    mask = run.masked(executor.class_obj, model_options, timestep)
    moved = run.reach(float(timestep[0]), mask)
    state, target = run.states(x, moved)
    branch.predicted = None
    denoised = executor(target, timestep, source.with_state(model_options, state), *args, **kwargs)
    difference = denoised - branch.predicted
    run.look(branch.apart)
    return run.image + run.answer(difference, mask)
