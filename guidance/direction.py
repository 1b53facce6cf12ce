"""Edit directions of pix2pix-zero (arXiv 2302.03027, section 3.2): the mean embedding of many sentences about the new
thing less that of sentences about the old one, to be added to any prompt. Pure torch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..host.files.storage import Format, read, write

FORMAT = Format("palimpsest.edit_direction/1", "edit direction", "Save Edit Direction")


class Embedded(NamedTuple):
    """A sentence as the text encoder gives it: [1, tokens, channels] and, where it has one, its pooled [1, n]."""

    embedding: Tensor
    pooled: Tensor | None


class EditDirection(NamedTuple):
    """A tuple of CPU tensors, so that the host's cache can weigh it. Never changed once made.

    embedding: [1, tokens, channels] fp32. pooled: [1, n] fp32, None where the text encoder gives none.
    """

    embedding: Tensor
    pooled: Tensor | None

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of a token and of the pooled output: what tells one kind of text encoder from another."""
        return self.embedding.shape[2], 0 if self.pooled is None else self.pooled.shape[1]

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        tensors = {name: tensor for name, tensor in self._asdict().items() if tensor is not None}
        write(path, FORMAT, tensors, {})

    @classmethod
    def load(cls, path: Path) -> EditDirection:
        """Read what `save` wrote. Raises ValueError, naming the file, where it is damaged or something else."""
        return read(path, FORMAT, cls._parse)

    @classmethod
    def _parse(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> EditDirection:
        direction = cls(tensors["embedding"], tensors.get("pooled"))
        found = [tensor for tensor in direction if tensor is not None]
        if [tensor.ndim for tensor in found] != [3, 2][: len(found)] or any(len(tensor) != 1 for tensor in found):
            raise ValueError(f"its tensors have shapes {[list(tensor.shape) for tensor in found]}")
        if not all(torch.isfinite(tensor).all() for tensor in found):
            raise ValueError("it holds NaN or infinite values")
        return direction


def direction_between(source: list[Embedded], target: list[Embedded]) -> EditDirection:
    """mean(target) - mean(source). Shorter embeddings are tiled, which leaves what is attended to as it is."""
    tokens = math.lcm(*(sentence.embedding.shape[1] for sentence in (*source, *target)))
    embedding = _mean([tiled(s.embedding, tokens) for s in target]) - _mean(
        [tiled(s.embedding, tokens) for s in source]
    )
    if any(sentence.pooled is None for sentence in (*source, *target)):
        return EditDirection(embedding, None)
    return EditDirection(embedding, _mean([s.pooled for s in target]) - _mean([s.pooled for s in source]))


def combine(terms: list[tuple[EditDirection, float]]) -> EditDirection:
    """The weighted sum. Raises ValueError for directions of different text encoders."""
    directions = [direction for direction, _ in terms]
    for other in directions[1:]:
        if other.widths != directions[0].widths:
            raise ValueError(
                f"Combine Edit Directions was given directions of {directions[0].widths[0]} and {other.widths[0]} "
                f"channels (pooled: {directions[0].widths[1]} and {other.widths[1]}): make both with the same CLIP."
            )
    tokens = math.lcm(*(direction.embedding.shape[1] for direction in directions))
    embedding = sum(weight * tiled(direction.embedding, tokens) for direction, weight in terms)
    if directions[0].pooled is None:
        return EditDirection(embedding, None)
    return EditDirection(embedding, sum(weight * direction.pooled for direction, weight in terms))


def apply(conditioning: list, direction: EditDirection, strength: float) -> list:
    """The host CONDITIONING with every prompt moved by strength * direction; itself at strength 0.

    Raises ValueError where the prompts come from another text encoder than the direction.
    """
    return [_moved(entry, direction, strength) for entry in conditioning] if strength else conditioning


def tiled(embedding: Tensor, tokens: int) -> Tensor:
    """[b, n, channels] repeated to `tokens`, a multiple of n, as the host does where prompts differ in length."""
    return embedding.repeat(1, tokens // embedding.shape[1], 1)


def _moved(entry: list, direction: EditDirection, strength: float) -> list:
    embedding, options = entry
    pooled = options.get("pooled_output")
    for name, tensor, difference in (("", embedding, direction.embedding), ("pooled ", pooled, direction.pooled)):
        if tensor is not None and difference is not None and tensor.shape[-1] != difference.shape[-1]:
            raise ValueError(
                f"The edit direction has {difference.shape[-1]} {name}channels but the prompt has {tensor.shape[-1]}: "
                "make both with the CLIP of the MODEL, in Edit Direction from Prompts and in the prompt's node."
            )
    tokens = math.lcm(embedding.shape[1], direction.embedding.shape[1])
    embedding = tiled(embedding, tokens) + strength * tiled(direction.embedding, tokens).to(embedding)
    if pooled is not None and direction.pooled is not None:
        options = {**options, "pooled_output": pooled + strength * direction.pooled.to(pooled)}
    return [embedding, options]


def _mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.float().cpu() for tensor in tensors]).mean(0)
