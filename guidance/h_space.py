"""Editing in h-space: Asyrp (arXiv 2210.10960) along directions that are mean differences (arXiv 2303.11073).

h is what a UNet's middle block gives. Asyrp adds a Δh to it and uses the noise e~ that is then predicted for the
predicted image alone, and the noise e of the unchanged h for the way on: in sampler space, down from sigma s to t, the
step is x' = (x - s e~) + t e. With one noise for both, most of the change would cancel. Its authors train Δh by CLIP
for each attribute; here it is, as in the second paper, the mean h of what shows the attribute less that of what does
not, at each noise level. For UNets whose decoder makes little of their middle block, h may also be what a block of the
decoder gives. Pure torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..host.files.storage import Format, read, write
from ..host.files.trajectory import ModelIdentity

FORMAT = Format("palimpsest.h_direction/1", "h-space direction", "Save H Space Direction")
APPLY = "Apply H Space Direction"


class HDirection(NamedTuple):
    """A tuple of CPU tensors, so that the host's cache can weigh it. Never changed once made.

    deltas: [n, c, h, w] fp32, the difference of mean features at each sigma.
    sigmas: [n] fp32, falling. model: the one whose features they are.
    block: the output block that takes them in, 0 for the middle block's output.
    """

    deltas: Tensor
    sigmas: Tensor
    model: ModelIdentity
    block: int

    def at(self, sigma: float) -> Tensor:
        """[c, h, w]: that of the sigma nearest by ratio."""
        return self.deltas[int((self.sigmas.log() - torch.tensor(sigma).log()).abs().argmin())]

    def share(self, sigmas: Tensor) -> float:
        """How many of its own noise levels there are for each step of a run along falling sigmas [m + 1].

        Every step adds to what the steps before have moved, so of finer ones each has to move less.
        """
        first, last = (float(sigma) * (1 + 1e-4) for sigma in (sigmas[0], sigmas[-1]))
        within = int(((self.sigmas <= first) & (self.sigmas > last)).sum())
        return max(within, 1) / (len(sigmas) - 1)

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        name, prediction, weights, spacing = self.model
        tensors = {"deltas": self.deltas, "sigmas": self.sigmas, "model.weights": weights, "model.spacing": spacing}
        write(path, FORMAT, tensors, {"model": name, "prediction": prediction, "block": str(self.block)})

    @classmethod
    def load(cls, path: Path) -> HDirection:
        """Read what `save` wrote. Raises ValueError, naming the file, where it is damaged or something else."""
        return read(path, FORMAT, cls._parse)

    @classmethod
    def _parse(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> HDirection:
        known = metadata["model"], metadata["prediction"], tensors["model.weights"], tensors["model.spacing"]
        direction = cls(tensors["deltas"], tensors["sigmas"], ModelIdentity(*known), int(metadata["block"]))
        if direction.deltas.ndim != 4 or direction.sigmas.shape != direction.deltas.shape[:1]:
            raise ValueError("its differences do not fit its sigmas")
        if not ((direction.sigmas.diff() < 0).all() and (direction.sigmas > 0).all()):
            raise ValueError("its sigmas do not fall")
        if not torch.isfinite(direction.deltas).all():
            raise ValueError("it holds NaN or infinite values")
        return direction


@dataclass(frozen=True)
class Moves:
    """How far h goes along a direction, in the steps that begin within [start, end) of a run, 0 to 1; and from where on
    noise is added, 1 for never.
    """

    direction: HDirection
    scale: float
    start: float
    end: float
    boost: float = 1.0

    node = APPLY

    @property
    def model(self) -> ModelIdentity:
        return self.direction.model

    @property
    def block(self) -> int:
        return self.direction.block

    def along(self, sigmas: Tensor) -> list[Tensor | None]:
        """[c, h, w] to add at each step of a run along falling sigmas [m + 1]; None where h stays as it is."""
        steps, scale = len(sigmas) - 1, self.scale * self.direction.share(sigmas)
        return [
            scale * self.direction.at(sigma) if self.start <= step / steps < self.end else None
            for step, sigma in enumerate(sigmas[:-1].tolist())
        ]
