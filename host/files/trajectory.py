"""The TRAJECTORY: a source image as the sampler-space latent at every sigma of a schedule. Pure torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..quote import quoted
from .conditioning import packed, unpacked
from .storage import Format, Parsed, read, write

EULER, DPMPP_2M = "euler", "dpmpp_2m"  # samplers of the host that images are inverted for
VALUES = "palimpsest.values"  # an option of a source's conditioning
FORMAT = Format("palimpsest.trajectory/2", "trajectory", "Save Trajectory")


def sigma_index(sigmas: Tensor, sigma: float) -> int | None:
    """The index of `sigma` in a schedule, or None where it holds no such sigma (relative tolerance 1e-4)."""
    distance = (sigmas - sigma).abs()
    nearest = int(distance.argmin())
    return nearest if distance[nearest] <= 1e-4 * abs(sigma) + 1e-6 else None


class ModelIdentity(NamedTuple):
    """What tells one diffusion model from another: its class, its sampling and some of its weights.

    weights: [parameters, samples]. spacing: of each the precision that it is known with, as an absolute number.
    """

    name: str
    prediction: str
    weights: Tensor
    spacing: Tensor

    def matches(self, other: ModelIdentity) -> bool:
        """True for the same model, also in another precision: its weights were rounded, and nothing else."""
        if (self.name, self.prediction, self.weights.shape) != (other.name, other.prediction, other.weights.shape):
            return False
        rounded = torch.maximum(self.spacing, other.spacing)
        return bool(((self.weights - other.weights).abs() <= rounded).all())


class Trajectory(NamedTuple):
    """A tuple of CPU tensors, so that the host's cache can weigh it. Never changed once made.

    states: [n + 1, b, c, (t,) h, w] fp32, the sampler-space latent at each sigma: for flow models the network's own
    input (1 - sigma) image + sigma noise, for others image + sigma noise, which is sqrt(1 + sigma^2) times that.
    sigmas: [n + 1] fp32, falling from the noise to the image.
    conditioning: the host CONDITIONING of the source prompt.
    model: the model that made it.
    sampler: the host's sampler that it was inverted for, which runs along it where no other is chosen.
    """

    states: Tensor
    sigmas: Tensor
    conditioning: list
    model: ModelIdentity
    sampler: str = EULER

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def values(self) -> Tensor | None:
        """[n, b, tokens, channels]: what cross-attention reads as the source's values at each step, in place of its
        prompt; None where the prompt serves.
        """
        return self.conditioning[0][1].get(VALUES)

    @property
    def bytes(self) -> int:
        """What the states hold."""
        return self.states.numel() * self.states.element_size()

    def index(self, sigma: float) -> int | None:
        """Where `sigma` stands in the schedule, or None."""
        return sigma_index(self.sigmas, sigma)

    def save(self, path: Path) -> None:
        """Write a safetensors file. Raises ValueError for conditionings that hold more than tensors and numbers."""
        write_file(path, FORMAT, self, {}, {})

    @classmethod
    def load(cls, path: Path) -> Trajectory:
        """Read what `save` wrote. Raises ValueError, naming the file, where it is damaged or something else."""
        return read_file(path, FORMAT, lambda trajectory, tensors, metadata: trajectory)


def write_file(path: Path, kind: Format, trajectory: Trajectory, tensors: dict, metadata: dict[str, str]) -> None:
    """Write a trajectory, and what else belongs to it, as safetensors; the file appears once it is whole.

    Raises ValueError for conditionings that hold more than tensors and numbers.
    """
    advice = f"invert without it, or keep the {kind.name} in the workflow instead of {kind.writer}."
    source, values = packed(trajectory.conditioning, "The trajectory's source conditioning", advice)
    model = {"model": trajectory.model.name, "prediction": trajectory.model.prediction}
    model |= {"sampler": trajectory.sampler}
    own = {"states": trajectory.states, "sigmas": trajectory.sigmas}
    own |= {"model.weights": trajectory.model.weights, "model.spacing": trajectory.model.spacing}
    write(path, kind, tensors | own | source, metadata | model | values)


def read_file(path: Path, kind: Format, parse: Callable[[Trajectory, dict, dict], Parsed]) -> Parsed:
    """What `parse` makes of the trajectory, the tensors and the metadata of a file that `write_file` wrote.

    Raises ValueError, naming the file, where it is damaged or something else.
    """
    return read(path, kind, lambda tensors, metadata: parse(_read_trajectory(tensors, metadata), tensors, metadata))


def _read_trajectory(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Trajectory:
    known = metadata["model"], metadata["prediction"], tensors["model.weights"], tensors["model.spacing"]
    sampler = metadata.get("sampler", EULER)  # files of before there was another
    source = unpacked(tensors, metadata)
    trajectory = Trajectory(tensors["states"], tensors["sigmas"], source, ModelIdentity(*known), sampler)
    if trajectory.states.ndim not in (5, 6) or len(trajectory.states) != len(trajectory.sigmas):
        raise ValueError("its states do not fit its sigmas")
    if not (trajectory.sigmas.diff() < 0).all():
        raise ValueError("its sigmas do not fall")
    if not torch.isfinite(trajectory.states).all():
        raise ValueError("it holds NaN or infinite values")
    if trajectory.values is not None and trajectory.values.shape[:2] != (trajectory.steps, trajectory.states.shape[1]):
        raise ValueError("its values do not fit its steps")
    if sampler not in (EULER, DPMPP_2M):
        raise ValueError(f"its sampler {quoted(sampler)} is unknown")
    return trajectory
