"""The TRAJECTORY: a source image as the sampler-space latent at every sigma of a schedule. Pure torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Parsed = TypeVar("Parsed")


class Format(NamedTuple):
    """A kind of file: the mark in its metadata, its name in sentences, and the node that writes it."""

    id: str
    name: str
    writer: str


FORMAT = Format("palimpsest.trajectory/1", "trajectory", "Save Trajectory")


def sigma_index(sigmas: Tensor, sigma: float) -> int | None:
    """The index of `sigma` in a schedule, or None where it holds no such sigma (relative tolerance 1e-4)."""
    distance = (sigmas - sigma).abs()
    nearest = int(distance.argmin())
    return nearest if distance[nearest] <= 1e-4 * abs(sigma) + 1e-6 else None


class ModelIdentity(NamedTuple):
    """What tells one diffusion model from another: its class, its prediction type and a few of its weights."""

    name: str
    prediction: str
    weights: Tensor

    def matches(self, other: ModelIdentity) -> bool:
        """True for the same model, also when its weights were loaded in another precision."""
        if (self.name, self.prediction, len(self.weights)) != (other.name, other.prediction, len(other.weights)):
            return False
        difference = (self.weights - other.weights).norm()
        return bool(difference <= 0.01 * self.weights.norm())


class Trajectory(NamedTuple):
    """A tuple of CPU tensors, so that the host's cache can weigh it. Never changed once made.

    states: [n + 1, b, c, h, w] fp32, the sampler-space latent (x = z * sqrt(1 + sigma^2)) at each sigma.
    sigmas: [n + 1] fp32, falling from the noise to the image.
    conditioning: the host CONDITIONING of the source prompt.
    model: the model that made it.
    """

    states: Tensor
    sigmas: Tensor
    conditioning: list
    model: ModelIdentity

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

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
    tensors = tensors | {
        "states": trajectory.states,
        "sigmas": trajectory.sigmas,
        "model.weights": trajectory.model.weights,
    }
    values: list[dict] = []
    for i, (embedding, options) in enumerate(trajectory.conditioning):
        tensors[f"conditioning.{i}.embedding"] = embedding
        kept = {key: value for key, value in options.items() if value is not None}
        tensors |= {f"conditioning.{i}.{k}": v for k, v in kept.items() if isinstance(v, Tensor)}
        values.append({k: v for k, v in kept.items() if isinstance(v, str | int | float | bool)})
        if lost := [k for k, v in kept.items() if not isinstance(v, Tensor | str | int | float | bool)]:
            raise ValueError(
                f"The trajectory's source conditioning holds '{lost[0]}', which a file cannot: "
                f"invert without it, or keep the {kind.name} in the workflow instead of {kind.writer}."
            )
    metadata = metadata | {
        "format": kind.id,
        "model": trajectory.model.name,
        "prediction": trajectory.model.prediction,
        "conditioning": json.dumps(values),
    }
    partial = path.with_suffix(".partial")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata)
    partial.replace(path)


def read_file(path: Path, kind: Format, parse: Callable[[Trajectory, dict, dict], Parsed]) -> Parsed:
    """What `parse` makes of the trajectory, the tensors and the metadata of a file that `write_file` wrote.

    Raises ValueError, naming the file, where it is damaged or something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Copies: a tensor that maps the file would crash the host once the file is written anew.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"'{path.name}' is not a readable safetensors file: {error}.") from error
    if metadata.get("format") != kind.id:
        raise ValueError(f"'{path.name}' is no {kind.name}: choose a file written by {kind.writer}.")
    try:
        return parse(_read_trajectory(tensors, metadata), tensors, metadata)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"'{path.name}' is a damaged {kind.name}: {error} is missing or wrong.") from error
    except ValueError as error:
        raise ValueError(f"'{path.name}' is a damaged {kind.name}: {error}.") from error


def _read_trajectory(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Trajectory:
    conditioning = []
    for i, options in enumerate(json.loads(metadata["conditioning"])):
        prefix = f"conditioning.{i}."
        named = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        conditioning.append([named.pop("embedding"), options | named])
    model = ModelIdentity(metadata["model"], metadata["prediction"], tensors["model.weights"])
    trajectory = Trajectory(tensors["states"], tensors["sigmas"], conditioning, model)
    if trajectory.states.ndim != 5 or len(trajectory.states) != len(trajectory.sigmas):
        raise ValueError("its states do not fit its sigmas")
    if not (trajectory.sigmas.diff() < 0).all():
        raise ValueError("its sigmas do not fall")
    if not torch.isfinite(trajectory.states).all():
        raise ValueError("it holds NaN or infinite values")
    return trajectory
