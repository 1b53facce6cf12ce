"""Alignment of two prompts' tokens, and the matrices that carry attention from one to the other. Pure torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from ..host.words import Special, Words

ALIGNMENTS = ("auto", "swap", "refine")
SIMILAR = "similar"  # InfEdit's refinement, which knows the prompts' embeddings: of a PromptEdit alone

# --- alignment -------------------------------------------------------------------------------------------------------


def align(source: Sequence[str], target: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of equal items, [source index, target index] in rising order: a longest common subsequence.

    This is Needleman-Wunsch with gap 0 and match 1, a mismatch never chosen, as in Prompt-to-Prompt's public code. Of
    the longest ones it is one with most pairs next to each other, and of these one near the target's beginning.
    """
    match = len(source) + 1  # a pair counts for more than all neighbours together
    # Of the first i and j items: the best score, and the best of those that end with the pair of the last two.
    best = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    paired = [[-1] * (len(target) + 1) for _ in range(len(source) + 1)]
    for i, one in enumerate(source, 1):
        for j, other in enumerate(target, 1):
            if one == other:
                paired[i][j] = match + max(best[i - 1][j - 1], paired[i - 1][j - 1] + 1)
            best[i][j] = max(best[i - 1][j], best[i][j - 1], paired[i][j])
    pairs, (i, j), joined = [], (len(source), len(target)), False
    while i and j:
        if joined or best[i][j] > max(best[i - 1][j], best[i][j - 1]):
            i, j = i - 1, j - 1
            pairs.append((i, j))
            joined = paired[i][j] + 1 > best[i][j]
        elif best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            i -= 1
    return pairs[::-1]


def _blocks(source: Words, target: Words) -> Iterator[tuple[slice, slice]]:
    """The words of both prompts in order: those in common pair by pair, and what lies between them."""
    pairs = [*_word_pairs(source.texts, target.texts), (len(source.texts), len(target.texts))]
    for (i, j), (next_i, next_j) in pairwise([(-1, -1), *pairs]):
        yield slice(i + 1, next_i), slice(j + 1, next_j)
        yield slice(next_i, next_i + 1), slice(next_j, next_j + 1)


def _word_pairs(source: Sequence[str], target: Sequence[str]) -> list[tuple[int, int]]:
    """As `align`, but place by place where that keeps as many words: then all others are swapped one for one."""
    pairs = align(source, target)
    in_place = [(i, i) for i, (one, other) in enumerate(zip(source, target, strict=False)) if one == other]
    return in_place if len(source) == len(target) and len(in_place) == len(pairs) else pairs


def resolve(source: Words, target: Words, alignment: str) -> str:
    """ "auto" as "swap" where the prompts differ only by words replaced one for one, as "refine" elsewhere."""
    if alignment != "auto":
        return alignment
    swapped = all(len(source.texts[ones]) == len(target.texts[others]) for ones, others in _blocks(source, target))
    return "swap" if swapped else "refine"


# --- attention carried over ------------------------------------------------------------------------------------------


class Carry(NamedTuple):
    """The edited attention map in parts: A_source @ source + A_target @ diag(own).

    source: [source tokens, target tokens] fp32. own: [target tokens] fp32. PromptEdit stacks both, [targets, ...].
    """

    source: Tensor
    own: Tensor


def carry_over(source: Words, target: Words, alignment: str, likeness: Tensor | None = None) -> Carry:
    """How the target's tokens take over the source's attention, by alignment "swap" or "refine".

    Swap (Prompt-to-Prompt, arXiv 2208.01626, section 3.2: replacement) pairs words, refine (prompt refinement) tokens.
    Either way the attention of start, end and padding is conserved, however much of it the other prompt has.
    likeness: [source tokens, target tokens], by which refinement pairs tokens that are not the same as well.
    """
    matrix = torch.zeros(source.length, target.length)
    for rows, columns in _swapped(source, target) if alignment == "swap" else _refined(source, target, likeness):
        if len(rows) == len(columns):
            matrix[rows, columns] = 1
        elif columns:
            matrix[torch.tensor(rows, dtype=torch.long)[:, None], columns] = 1 / len(columns)
    for one, others in _paired_specials(source, target):
        for other in others:
            for rows, columns in zip(one, other, strict=True):
                _fold(matrix, rows, columns, 1 / len(others))
    return Carry(matrix, (matrix.sum(0) == 0).float())


def _swapped(source: Words, target: Words) -> Iterator[tuple[list[int], list[int]]]:
    """Source tokens and the target tokens in their place, of each text encoder: word by word, or by blocks where the
    words do not pair up.
    """
    for i, j in _blocks(source, target):
        for one, other in zip(source.encoders, target.encoders, strict=True):
            ones = [_within(tokens, one) for tokens in source.tokens[i]]
            others = [_within(tokens, other) for tokens in target.tokens[j]]
            if len(ones) == len(others):
                yield from zip(ones, others, strict=True)
            else:
                yield [*chain.from_iterable(ones)], [*chain.from_iterable(others)]


def _refined(source: Words, target: Words, likeness: Tensor | None) -> Iterator[tuple[list[int], list[int]]]:
    """Of each text encoder: the tokens that both prompts have; and of what lies between two such pairs, the two that
    are most alike.
    """
    for one, other in zip(source.encoders, target.encoders, strict=True):
        ones = _within(chain.from_iterable(source.tokens), one)
        others = _within(chain.from_iterable(target.tokens), other)
        pairs = align([source.pieces[i] for i in ones], [target.pieces[j] for j in others])
        yield [ones[i] for i, _ in pairs], [others[j] for _, j in pairs]
        if likeness is None:
            continue
        for (i, j), (next_i, next_j) in pairwise([(-1, -1), *pairs, (len(ones), len(others))]):
            between, across = ones[i + 1 : next_i], others[j + 1 : next_j]
            if between and across:
                row, column = divmod(int(likeness[between][:, across].argmax()), len(across))
                yield [between[row]], [across[column]]


def _within(tokens: Iterable[int], encoder: range) -> list[int]:
    return [token for token in tokens if token in encoder]


def _paired_specials(source: Words, target: Words) -> Iterator[tuple[Special, list[Special]]]:
    """Each source chunk's specials and those that share their attention; the last of a text encoder serves all chunks
    that remain.
    """
    for encoders in zip(source.encoders, target.encoders, strict=True):
        ones, others = (
            [special for special in words.specials if special.tail[0] in encoder]
            for words, encoder in zip((source, target), encoders, strict=True)
        )
        for k, one in enumerate(ones):
            if k >= len(others):
                yield one, [Special(others[-1].head, others[-1].tail[-1:])]
            else:
                yield one, others[k:] if k == len(ones) - 1 else [others[k]]


def _fold(matrix: Tensor, rows: range, columns: range, weight: float) -> None:
    """Position by position; surplus rows all go to the last column, spare columns share the last row."""
    if not rows:  # an encoder without a start token, in both prompts
        return
    common = min(len(rows), len(columns))
    matrix[rows[:common], columns[:common]] = weight
    matrix[rows[common:], columns[-1]] = weight
    spare = columns[common - 1 :]
    matrix[rows[-1], spare] = weight / len(spare)


# --- the socket ------------------------------------------------------------------------------------------------------


class PromptEdit(NamedTuple):
    """The PROMPT_EDIT socket: one source prompt and K targets.

    alignments: "swap" or "refine" for each target. embeddings: the source's, [1, tokens, channels], and the targets',
    [K, tokens, channels], by which they are recognised elsewhere; targets of fewer tokens are repeated to a common
    length, which leaves attention over them as it is. pooled: the targets' pooled embeddings [K, channels].
    """

    source: Words
    targets: tuple[Words, ...]
    alignments: tuple[str, ...]
    embeddings: tuple[Tensor, Tensor]
    pooled: Tensor | None = None

    def carry(self, alignment: str | None = None) -> Carry:
        """For all targets: source [K, source tokens, target tokens], own [K, target tokens].

        Of a repeated target, the source's attention goes to the first copy, the target's own to all. `alignment`
        overrides each target's, and may be `SIMILAR`: refinement in which of the tokens between two that both prompts
        have, the two whose embeddings have the greatest cosine are paired too (InfEdit, arXiv 2312.04965).
        """
        length = self.embeddings[1].shape[1]
        likeness = [None] * len(self.targets)
        if alignment == SIMILAR:
            source, *targets = (normalize(tokens.float(), dim=-1) for side in self.embeddings for tokens in side)
            likeness = [source @ target.T for target in targets]
        carries = [
            carry_over(self.source, target, alignment or own, alike)
            for target, own, alike in zip(self.targets, self.alignments, likeness, strict=True)
        ]
        return Carry(
            torch.stack([pad(carry.source, (0, length - len(carry.own))) for carry in carries]),
            torch.stack([carry.own.repeat(length // len(carry.own)) for carry in carries]),
        )

    def shared(self) -> Tensor:
        """[K, source tokens, target tokens]: which tokens of the source stand in for each that both prompts have.

        Their weights are 1 together; a token of the target alone has none.
        """
        carried = self.carry("refine").source
        total = carried.sum(1, keepdim=True)
        return carried / total.where(total > 0, torch.ones(()))


def same_prompt(one: Tensor, other: Tensor) -> bool:
    """Whether two embeddings [b, tokens, channels] are a prompt's (1 % apart at most, as for another precision)."""
    return one.shape == other.shape and bool((one.to(other) - other).norm() <= 0.01 * other.norm())


def join(edits: Sequence[PromptEdit]) -> PromptEdit:
    """The targets of several edits of one source, in order."""
    targets = [edit.embeddings[1] for edit in edits]
    length = lcm(*(target.shape[1] for target in targets))
    return PromptEdit(
        edits[0].source,
        tuple(chain.from_iterable(edit.targets for edit in edits)),
        tuple(chain.from_iterable(edit.alignments for edit in edits)),
        (edits[0].embeddings[0], torch.cat([target.repeat(1, length // target.shape[1], 1) for target in targets])),
        None if edits[0].pooled is None else torch.cat([edit.pooled for edit in edits]),
    )
