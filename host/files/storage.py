"""Files of the pack: safetensors with a mark that tells their kind. Pure torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..quote import quoted

Parsed = TypeVar("Parsed")


class Format(NamedTuple):
    """A kind of file: the mark in its metadata, its name in sentences, and the node that writes it."""

    id: str
    name: str
    writer: str


def write(path: Path, kind: Format, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file of this kind, which appears once it is whole. Raises ValueError where that fails."""
    partial = path.with_suffix(".partial")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, partial, metadata | {"format": kind.id})
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        with suppress(OSError):
            partial.unlink()
        raise ValueError(
            f"{kind.writer} cannot write {quoted(path.name)} ({_reason(error)}): check filename_prefix and the output "
            "folder."
        ) from error


def read(path: Path, kind: Format, parse: Callable[[dict[str, Tensor], dict[str, str]], Parsed]) -> Parsed:
    """What `parse` makes of the tensors and the metadata of a file that `write` wrote.

    Raises ValueError, naming the file, where it is damaged or something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Copies: a tensor that maps the file would crash the host once the file is written anew.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{quoted(path.name)} is not a readable safetensors file: {_reason(error)}.") from error
    if (found := metadata.get("format", "")) != kind.id:
        if found.rpartition("/")[0] == kind.id.rpartition("/")[0]:
            raise ValueError(
                f"{quoted(path.name)} was written by another version of Palimpsest: make the {kind.name} anew and "
                f"write it with {kind.writer}."
            )
        raise ValueError(f"{quoted(path.name)} is no {kind.name}: choose a file written by {kind.writer}.")
    try:
        return parse(tensors, metadata)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{quoted(path.name)} is a damaged {kind.name}: {error} is missing or wrong.") from error
    except ValueError as error:
        raise ValueError(f"{quoted(path.name)} is a damaged {kind.name}: {error}.") from error


def _reason(error: SafetensorError | OSError) -> str:
    """Without the path, which an OSError repeats whole."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
