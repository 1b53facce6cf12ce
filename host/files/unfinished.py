"""What a long run had done when it was stopped, kept in the host's temp folder for the next run of the same inputs."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import folder_paths
from safetensors import SafetensorError
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
        """What was kept; nothing where there is no file, or one that cannot be read."""
        try:
            # Copies: a file that tensors map can be neither replaced nor removed on Windows.
            return {name: tensor.clone() for name, tensor in load_file(self.path).items()}
        except FileNotFoundError:
            return {}
        except (SafetensorError, OSError) as error:
            logging.warning("Palimpsest begins anew, as it cannot read %s: %s", self.path, error)
            return {}

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Where that fails it is only logged: the run ends as it would have."""
        partial = self.path.with_suffix(".partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial)
            partial.replace(self.path)
        except (SafetensorError, OSError) as error:
            logging.warning("Palimpsest cannot keep the finished steps in %s: %s", self.path, error)

    def remove(self) -> None:
        """Fails as `save` does."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            logging.warning("Palimpsest cannot remove %s: %s", self.path, error)
