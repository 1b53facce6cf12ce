"""Which words of a target take their attention from which of the source's, as people read it. Pure torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..host.words import Words
from .alignment import carry_over

KEPT, SWAPPED, NEW, DROPPED = "kept", "swapped", "new", "dropped"


class Pair(NamedTuple):
    """Words in a row of the source and the words of the target that read from them; one side may be empty."""

    source: tuple[str, ...]
    target: tuple[str, ...]

    @property
    def state(self) -> str:
        if self.source and self.target:
            return KEPT if self.source == self.target else SWAPPED
        return DROPPED if self.source else NEW


def word_pairs(source: Words, target: Words, alignment: str) -> list[Pair]:
    """All words of both prompts in order, by alignment "swap" or "refine": what `carry_over` joins is a pair."""
    joined = _members(source) @ carry_over(source, target, alignment).source @ _members(target).T > 0
    return [Pair(source.texts[ones], target.texts[others]) for ones, others in _groups(joined)]


def _members(words: Words) -> Tensor:
    """[words, tokens] 1 at each word's tokens."""
    found = torch.zeros(len(words.texts), words.length)
    for i, tokens in enumerate(words.tokens):
        found[i, list(tokens)] = 1
    return found


def _groups(joined: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns in order: a row or a column that is joined to none, or the least block of all that are."""
    rows, columns = joined.shape
    i = j = 0
    while i < rows or j < columns:
        end_i, end_j = i, j
        if i < rows and not joined[i].any():
            end_i += 1
        elif j < columns and not joined[:, j].any():
            end_j += 1
        else:
            grown = (i + 1, j)
            while grown != (end_i, end_j):
                end_i, end_j = grown
                _, others = joined[i:end_i].nonzero(as_tuple=True)
                end_j = max(end_j, int(others.max()) + 1)
                ones, _ = joined[:, j:end_j].nonzero(as_tuple=True)
                grown = (max(end_i, int(ones.max()) + 1), end_j)
        yield slice(i, end_i), slice(j, end_j)
        i, j = end_i, end_j


def told(pairs: list[Pair], alignment: str) -> str:
    """The changes in one line: "swap: circle → star", "refine: + fluffy"."""
    signs = {SWAPPED: "{} → {}", NEW: "+ {1}", DROPPED: "- {0}"}
    changes = [
        signs[pair.state].format(" ".join(pair.source), " ".join(pair.target)) for pair in pairs if pair.state != KEPT
    ]
    return f"{alignment}: {', '.join(changes) or 'no word changes'}"
