"""A folder of pairs of pictures, as `imagefolder` of the `datasets` library reads it: beside `metadata.jsonl`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

METADATA, DONE = "metadata.jsonl", "done.json"
SIDES = ("input", "edited")


class Pairs:
    """Those of one run, in a folder that other runs may share.

    path: made where it is missing. inputs: all that the run's pictures depend on, by which it goes on after a stop.
    Raises OSError for a folder that cannot be made.
    """

    def __init__(self, path: Path, *inputs: object) -> None:
        self.path, self.run = path, hashlib.sha256(repr(inputs).encode()).hexdigest()[:8]
        path.mkdir(parents=True, exist_ok=True)

    @property
    def done(self) -> int:
        """How many batches are finished."""
        return self._all_done().get(self.run, 0)

    @property
    def lines(self) -> list[dict]:
        """What is said of the run's pairs, in order."""
        if not (path := self.path / METADATA).exists():
            return []
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return [line for line in lines if line["run"] == self.run]

    def draw(self, batch: int, number: int, pictures: Sequence[Tensor]) -> dict[str, str]:
        """Writes both pictures [h, w, 3] in 0..1 of a batch's pair; their names for `finish`."""
        names = {side: f"{self.run}-{batch:05}-{number:02}-{side}.png" for side in SIDES}
        for name, picture in zip(names.values(), pictures, strict=True):
            Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy()).save(self.path / name)
        return {f"{side}_file_name": name for side, name in names.items()}

    def finish(self, batch: int, lines: Sequence[dict]) -> None:
        """Adds what is said of a batch's pairs, after the names of their pictures."""
        with (self.path / METADATA).open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps({**line, "run": self.run, "batch": batch}, ensure_ascii=False) + "\n" for line in lines
            )
        partial = self.path / f"{DONE}.partial"
        partial.write_text(json.dumps(self._all_done() | {self.run: batch + 1}), encoding="utf-8")
        partial.replace(self.path / DONE)

    def pictures(self, lines: Sequence[dict]) -> tuple[Tensor, Tensor]:
        """Both sides [b, h, w, 3] in 0..1 of some of them."""
        before, after = (
            torch.stack([_read(self.path / line[f"{side}_file_name"]) for line in lines]) for side in SIDES
        )
        return before, after

    def _all_done(self) -> dict[str, int]:
        path = self.path / DONE
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _read(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)
