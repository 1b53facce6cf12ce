"""What a long run had done when it was stopped, kept in the host's temp folder for the next run of the same inputs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import folder_paths
from safetensors.torch import load_file, save_file
from torch import Tensor


class Unfinished:
    """A file named by a kind of run and by all that its result depends on."""

    def __init__(self, kind: str, settings: tuple, *tensors: Tensor) -> None:
        digest = hashlib.sha256(repr(settings).encode())
        for tensor in tensors:
            digest.update(repr(tensor.shape).encode() + tensor.float().cpu().contiguous().numpy().tobytes())
        folder = Path(folder_paths.get_temp_directory()) / "palimpsest"
        self.path = folder / f"{kind}-{digest.hexdigest()[:32]}.safetensors"

    def load(self) -> dict[str, Tensor]:
        """What was kept, or nothing."""
        return load_file(self.path) if self.path.exists() else {}

    def save(self, tensors: dict[str, Tensor]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        save_file(tensors, partial)
        partial.replace(self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
