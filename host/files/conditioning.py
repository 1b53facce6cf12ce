"""The host's CONDITIONING as tensors and metadata of a file. Pure torch."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from .storage import Format, read, write

FORMAT = Format("palimpsest.conditioning/1", "conditioning", "Save Conditioning")
KEY = "conditioning"
SEED = "seed"  # an option that takes the place of the sampler's own where the host encodes the conditioning


def copied(conditioning: list) -> list:
    """The same conditioning in tensors of its own."""
    return [
        [embedding.clone(), {key: v.clone() if isinstance(v, Tensor) else v for key, v in options.items()}]
        for embedding, options in conditioning
    ]


def packed(conditioning: list, name: str, advice: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file holds of a conditioning: its tensors, and its numbers and strings as metadata.

    Raises ValueError, with the conditioning's name and what to do, where it holds anything else.
    """
    tensors: dict[str, Tensor] = {}
    values: list[dict] = []
    for i, (embedding, options) in enumerate(conditioning):
        kept = {"embedding": embedding} | {key: value for key, value in options.items() if value is not None}
        # Copies: entries may share a tensor, which a file does not allow.
        tensors |= {f"{KEY}.{i}.{k}": v.clone() for k, v in kept.items() if isinstance(v, Tensor)}
        values.append({k: v for k, v in kept.items() if isinstance(v, str | int | float | bool)})
        if lost := [k for k, v in kept.items() if not isinstance(v, Tensor | str | int | float | bool)]:
            raise ValueError(f"{name} holds '{lost[0]}', which a file cannot: {advice}")
    return tensors, {KEY: json.dumps(values)}


def unpacked(tensors: dict[str, Tensor], metadata: dict[str, str]) -> list:
    """The conditioning that `packed` was given, its tensors on the CPU."""
    conditioning = []
    for i, options in enumerate(json.loads(metadata[KEY])):
        prefix = f"{KEY}.{i}."
        named = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        conditioning.append([named.pop("embedding"), options | named])
    return conditioning


def save(conditioning: list, path: Path) -> None:
    """Write a safetensors file. Raises ValueError where there is more than tensors, numbers and strings to hold."""
    advice = "connect it from before the node that adds this, such as a ControlNet or a LoRA hook."
    write(path, FORMAT, *packed(conditioning, "The conditioning", advice))


def load(path: Path) -> list:
    """Read what `save` wrote. Raises ValueError, naming the file, where it is damaged or something else."""
    return read(path, FORMAT, unpacked)
