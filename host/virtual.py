"""Editing without inversion: the sampler is told that the image, moved by the difference of two predictions, is there.

Let x be the target's latent, d how far it is from the source's, and Delta = D(x; target) - D(x - d; source) the
difference of their denoised estimates. A step of every method of this family takes d to Delta + kept (d - Delta), and
the edit is the image plus d. Where the model's answer is image + Delta, that is what the host's own samplers do to x:
`lcm` with kept = 0, `euler` with t / s and `euler_ancestral` with (t / s)^2 for a step from sigma s to t. What is left
is to follow d, and to run the source at x - d: the image with the sampler's own noise on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import KSAMPLER, CFGGuider, Sampler
from torch import Tensor

from . import source
from .refusals import check_follows, check_image_run
from .sampler import function_name, settings
from .trajectory import Trajectory

KEY = f"{source.KEY}.virtual"


@dataclass(frozen=True)
class Virtual:
    """What a MODEL carries beside its source branch. Immutable; the state of a run is in `_Run`.

    samples: [b, c, h, w], the image as the host's latent. mask: its noise mask, or None.
    fresh: whether every step but the first has noise of its own, in place of the sampler's.
    """

    samples: Tensor
    mask: Tensor | None
    fresh: bool


def attach_virtual(model: ModelPatcher, trajectory: Trajectory, virtual: Virtual) -> ModelPatcher:
    """A clone of `model` whose samples are edits of an image that `trajectory` has with noise on it at every sigma.

    Raises ValueError as `source.attach`.
    """
    model, branch = source.branched(model, trajectory)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)
    model.model_options["transformer_options"] |= {source.KEY: replace(branch, virtual=True), KEY: virtual}
    return model


def virtual_of(model: ModelPatcher) -> Virtual | None:
    return model.model_options["transformer_options"].get(KEY)


Kept = Callable[[float, float], float]
"""How much of a difference a step from one sigma to the next keeps, 0 to 1."""


def kept_by(sampler: Sampler) -> Kept | None:
    """What a sampler keeps of the latent, beside its model's answer and noise; None where a step is no such mixture."""
    if not isinstance(sampler, KSAMPLER):
        return None
    name, options = function_name(sampler), settings(sampler)
    if name == "sample_euler" and options.get("s_churn", 0) > 0:
        return None
    eta = options.get("eta", 1.0)

    def ancestral(sigma: float, below: float) -> float:
        added = min(below, eta * below * max(1 - (below / sigma) ** 2, 0) ** 0.5)
        return (below**2 - added**2) ** 0.5 / sigma

    known: dict[str, Kept] = {
        "sample_lcm": lambda sigma, below: 0.0,
        "sample_euler": lambda sigma, below: below / sigma,
        "sample_ddpm": lambda sigma, below: (below / sigma) ** 2,
        "sample_euler_ancestral": ancestral,
    }
    return known.get(name)


class _Run:
    """How far the target of one sampling run is from its source, followed from call to call.

    image: [1 or b, c, h, w] in sampler space.
    """

    def __init__(
        self, image: Tensor, images: int, sigmas: Tensor, kept: Kept, fresh: bool, mask: Tensor | None, seed: int
    ) -> None:
        self.image, self.sigmas, self.kept, self.fresh, self.mask = image, sigmas, kept, fresh, mask
        self.generator = torch.Generator().manual_seed(seed + 1)  # the run's own noise has been drawn by the seed
        self.noise: Tensor | None = None  # in place of the sampler's
        self.sigma = float(sigmas[0])
        self.moved = self.answered = image.new_zeros(images, *image.shape[1:])  # d, and Delta of the last call

    def reach(self, sigma: float, mask: Tensor | None) -> Tensor:
        """d at `sigma`, where the step that ends there is taken. mask: of the host, which puts the image back."""
        if sigma < self.sigma:
            self.moved = self.answered + self.kept(self.sigma, sigma) * (self.moved - self.answered)
            self.moved = self.moved if mask is None else self.moved * mask
            self.sigma = sigma
            if self.fresh:
                self.noise = torch.randn(self.image.shape, generator=self.generator).to(self.image)
        return self.moved

    def states(self, x: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """The source's latent [1 or b, c, h, w] and the target's [b, c, h, w] for the sampler's x.

        Targets of one image share its noise, and so one source.
        """
        if self.noise is None and len(self.image) == len(x):
            return x - moved, x
        state = (x - moved)[: len(self.image)] if self.noise is None else self.image + self.sigma * self.noise
        return state, state + moved

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
    virtual, image = options[KEY], options[source.KEY].trajectory.states[-1]
    kept = kept_by(sampler)
    check_follows(sampler, kept is not None)
    check_image_run(guider, image, noise, latent, sigmas)
    device = guider.model_patcher.load_device
    run = _Run(image.to(device), len(latent), sigmas, kept, virtual.fresh, mask, seed or 0)
    options[KEY] = run
    result = executor(noise, latent, sampler, sigmas, mask, callback, quiet, seed, **kwargs)
    moved = run.reach(float(sigmas[-1]), None)
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
    run.answered = denoised - branch.predicted
    if mask is not None:
        run.answered = run.answered * mask
    return run.image + run.answered
