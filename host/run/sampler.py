"""The pack's own samplers, written over what the host hands to one; and what is known of other samplers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

from comfy.samplers import KSAMPLER, CFGGuider, Sampler
from torch import Tensor

from ..files.trajectory import EULER, Trajectory


@dataclass(frozen=True)
class Run:
    """One sampling run. latent: [b, c, h, w] in sampler space, as the run was given it."""

    guider: CFGGuider
    sigmas: Tensor
    arguments: dict  # of every call of the guider
    callback: Callable[[int, Tensor, Tensor, int], None] | None
    latent: Tensor
    denoise_mask: Tensor | None

    @property
    def model_options(self) -> dict:
        return self.arguments["model_options"]

    def denoise(self, x: Tensor, sigma: float, **changed) -> Tensor:
        """The guided denoised estimate of x [b, c, h, w], with arguments of the call `changed`."""
        return self.guider(x, x.new_full((len(x),), sigma), **self.arguments | changed)

    def steps(self) -> Iterator[tuple[int, float, float]]:
        """Every step's index, sigma and next sigma."""
        levels = self.sigmas.tolist()
        return ((i, *pair) for i, pair in enumerate(zip(levels, levels[1:], strict=False)))

    def report(self, done: int, denoised: Tensor, x: Tensor, total: int | None = None) -> None:
        """Progress and preview after number `done` of `total`, which are the steps where not given."""
        if self.callback is not None:
            self.callback(done, denoised, x, len(self.sigmas) - 1 if total is None else total)


class OwnSampler(Sampler, ABC):
    """A sampler of the pack: `walk` stands for the host's `sample` and its many arguments."""

    @abstractmethod
    def walk(self, run: Run) -> Tensor:
        """The latent [b, c, h, w] that the run ends at, in sampler space."""

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
        return self.walk(Run(model_wrap, sigmas, extra_args, callback, latent_image, denoise_mask))


def function_name(sampler: Sampler) -> str:
    """Of its function in the host, however another pack wraps it: as a partial or in an object of its own."""
    if not isinstance(sampler, KSAMPLER):
        return ""
    function = sampler.sampler_function
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def told_mismatch(sampler: Sampler, trajectory: Trajectory) -> str | None:
    """What to say where `trajectory` was inverted for another sampler, None where it was not.

    What is inverted for euler is fit for any: its inversion is that of none to more than first order.
    """
    used = function_name(sampler).removeprefix("sample_") or type(sampler).__name__
    if trajectory.sampler in (EULER, used):
        return None
    return (
        f"The trajectory was inverted for {trajectory.sampler}, but is sampled with {used}, which gives the image back "
        f"less exactly: choose {trajectory.sampler}."
    )


def settings(sampler: KSAMPLER) -> dict[str, Any]:
    """What its function is called with beside the run: its options, or else the defaults, a partial's among them."""
    parameters = signature(sampler.sampler_function).parameters
    return {name: parameter.default for name, parameter in parameters.items()} | sampler.extra_options
