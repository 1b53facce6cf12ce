"""The TRAJECTORY: a source image as the sampler-space latent at every sigma of a schedule. Pure torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "palimpsest.trajectory/1"


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
        tensors = {"states": self.states, "sigmas": self.sigmas, "model.weights": self.model.weights}
        values: list[dict] = []
        for i, (embedding, options) in enumerate(self.conditioning):
            tensors[f"conditioning.{i}.embedding"] = embedding
            kept = {key: value for key, value in options.items() if value is not None}
            tensors |= {f"conditioning.{i}.{k}": v for k, v in kept.items() if isinstance(v, Tensor)}
            values.append({k: v for k, v in kept.items() if isinstance(v, str | int | float | bool)})
            if lost := [k for k, v in kept.items() if not isinstance(v, Tensor | str | int | float | bool)]:
                raise ValueError(
                    f"The trajectory's source conditioning holds '{lost[0]}', which a file cannot: "
                    "invert without it, or keep the trajectory in the workflow instead of Save Trajectory."
                )
        metadata = {
            "format": FORMAT,
            "model": self.model.name,
            "prediction": self.model.prediction,
            "conditioning": json.dumps(values),
        }
        partial = path.with_suffix(".partial")
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Trajectory:
        """Read what `save` wrote. Raises ValueError, naming the file, where it is damaged or something else."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                # Copies: a tensor that maps the file would crash the host once the file is written anew.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"'{path.name}' is not a readable safetensors file: {error}.") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"'{path.name}' is no trajectory: choose a file written by Save Trajectory.")
        try:
            conditioning = []
            for i, options in enumerate(json.loads(metadata["conditioning"])):
                prefix = f"conditioning.{i}."
                named = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                conditioning.append([named.pop("embedding"), options | named])
            model = ModelIdentity(metadata["model"], metadata["prediction"], tensors["model.weights"])
            trajectory = cls(tensors["states"], tensors["sigmas"], conditioning, model)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"'{path.name}' is a damaged trajectory: {error} is missing or wrong.") from error
        if trajectory.states.ndim != 5 or len(trajectory.states) != len(trajectory.sigmas):
            raise ValueError(f"'{path.name}' is a damaged trajectory: its states do not fit its sigmas.")
        if not (trajectory.sigmas.diff() < 0).all():
            raise ValueError(f"'{path.name}' is a damaged trajectory: its sigmas do not fall.")
        if not torch.isfinite(trajectory.states).all():
            raise ValueError(f"'{path.name}' is a damaged trajectory: it holds NaN or infinite values.")
        return trajectory
