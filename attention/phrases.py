"""What people type about single words of a prompt: "fluffy:2, red:-1". Pure torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, groupby

import torch
from torch import Tensor

from ..host.quote import quoted, shortened
from ..host.words import Words, find_words
from .alignment import PromptEdit, carry_over

WINDOW = "lion:0.4 or lion:0.1-0.4"
LISTED = 400  # signs of the words that are offered: all those of a prompt that fits into one chunk of tokens


def split_phrases(text: str) -> list[str]:
    """The phrases of a list with commas between them."""
    return [phrase.strip() for phrase in text.split(",") if phrase.strip()]


def gains(text: str, edit: PromptEdit) -> Tensor:
    """[k, target tokens]: the factor of each token's attention, from "word:factor, ..." and 1 for all others.

    Raises ValueError for a word that no target prompt has, and for what is no number.
    """
    table = torch.ones(edit.embeddings[1].shape[:2])
    for phrase, number in _numbered(text, "reweight", "fluffy:2"):
        factor = _number(number, f"{phrase}:{number}", "reweight", "fluffy:2")
        _set(table, phrase, edit, "reweight", torch.tensor(factor))
    return table


def windows(text: str, edit: PromptEdit, start: float, end: float) -> Tensor:
    """[2, k, target tokens] fp64: start and end of each token's replacement, as fractions of the schedule.

    From "word:end, word:start-end, ..."; `start` and `end` are those of all other tokens. Raises ValueError as `gains`.
    """
    shape = edit.embeddings[1].shape[:2]
    table = torch.tensor([start, end], dtype=torch.float64)[:, None, None].repeat(1, *shape)
    for phrase, numbers in _numbered(text, "word_schedule", WINDOW):
        where = f"{phrase}:{numbers}"
        ends = [_number(part, where, "word_schedule", WINDOW) for part in numbers.split("-")]
        if len(ends) > 2 or not all(0 <= number <= 1 for number in ends):
            raise ValueError(
                f"word_schedule of P2P Attention Controller has {quoted(where)}, but a schedule is one end or "
                f"start-end, fractions from 0 to 1: write for example {WINDOW}."
            )
        if len(ends) == 2 and ends[0] >= ends[1]:
            raise ValueError(
                f"word_schedule of P2P Attention Controller has {quoted(where)}, which is to end at {ends[1]:g} but "
                f"starts at {ends[0]:g}: write for example {WINDOW}."
            )
        window = torch.tensor([0.0, *ends] if len(ends) == 1 else ends, dtype=torch.float64)
        _set(table, phrase, edit, "word_schedule", window[:, None])
    return table


def phrase_columns(phrases: Sequence[str], edit: PromptEdit, node: str) -> tuple[Tensor, Tensor]:
    """[k, source tokens, m] and [k, target tokens, m], 1 at the tokens of each phrase.

    Raises ValueError for a phrase that none of the prompts has.
    """
    source, target = _no_columns(edit, len(phrases))
    for m, phrase in enumerate(phrases):
        source[:, find_words(edit.source, phrase), m] = 1
        for row, words in enumerate(edit.targets):
            _mark(target[row, :, m], words, find_words(words, phrase))
        if not source[..., m].any() and not target[..., m].any():
            raise ValueError(
                f"{node} looks for {quoted(phrase)}, but the prompts have the words "
                f"{_listed(edit.source, *edit.targets)}: write words of Prompt Edit's prompts, with commas between "
                "them."
            )
    return source, target


def changed_columns(edit: PromptEdit, joined: bool = False) -> tuple[Tensor, Tensor]:
    """As phrase_columns, a phrase for each word that one prompt has and the other has not; m is 0 for equal prompts.

    joined: one phrase for all such words that stand side by side.
    """
    carries = [carry_over(edit.source, words, "refine") for words in edit.targets]
    found = _runs if joined else _not_all
    dropped = [found(carry.source.any(1), edit.source) for carry in carries]
    added = [found(carry.own == 0, words) for carry, words in zip(carries, edit.targets, strict=True)]
    source, target = _no_columns(edit, max(len(one) + len(other) for one, other in zip(dropped, added, strict=True)))
    for row, (ones, others) in enumerate(zip(dropped, added, strict=True)):
        for m, tokens in enumerate(ones):
            source[row, tokens, m] = 1
        for m, tokens in enumerate(others, len(ones)):
            _mark(target[row, :, m], edit.targets[row], tokens)
    return source, target


def prompt_columns(phrases: Sequence[str], words: Words) -> Tensor:
    """[tokens, m], 1 at the tokens of each phrase of a prompt, or of each of its words where no phrase is given.

    Raises ValueError for a phrase that the prompt does not have.
    """
    spans = [find_words(words, phrase) for phrase in phrases]
    if missing := [phrase for phrase, tokens in zip(phrases, spans, strict=True) if not tokens]:
        raise ValueError(
            f"Attention Maps looks for {quoted(missing[0])}, but the image's prompt has the words {_listed(words)}: "
            "write some of them, with commas between them, or leave the field empty."
        )
    columns = [torch.zeros(words.length).index_fill(0, torch.tensor(tokens), 1) for tokens in spans or words.tokens]
    return torch.stack(columns, 1)


def _not_all(marked: Tensor, words: Words) -> list[tuple[int, ...]]:
    return [tokens for tokens in words.tokens if not marked[list(tokens)].all()]


def _runs(marked: Tensor, words: Words) -> list[tuple[int, ...]]:
    """As `_not_all`, what stands side by side as one."""
    runs = groupby(words.tokens, lambda tokens: not marked[list(tokens)].all())
    return [tuple(chain.from_iterable(tokens)) for changed, tokens in runs if changed]


def _no_columns(edit: PromptEdit, count: int) -> tuple[Tensor, Tensor]:
    targets, length = edit.embeddings[1].shape[:2]
    return torch.zeros(targets, edit.source.length, count), torch.zeros(targets, length, count)


def _mark(column: Tensor, words: Words, tokens: Sequence[int]) -> None:
    """Sets a column [target tokens] to 1 at the tokens of a prompt, in all its copies where it is repeated."""
    for copy in column.split(words.length):
        copy[list(tokens)] = 1


def _numbered(text: str, field: str, example: str) -> list[tuple[str, str]]:
    pairs = [tuple(part.strip() for part in phrase.rpartition(":")[::2]) for phrase in split_phrases(text)]
    if wrong := [number for phrase, number in pairs if not phrase]:
        raise ValueError(
            f"{field} of P2P Attention Controller has {quoted(wrong[0])} without a colon: write for example {example}."
        )
    return pairs


def _number(text: str, where: str, field: str, example: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{field} of P2P Attention Controller has {quoted(where)}, where {quoted(text)} is no number: write for "
            f"example {example}."
        )
    return number


def _set(table: Tensor, phrase: str, edit: PromptEdit, field: str, value: Tensor) -> None:
    """Sets table [..., k, target tokens] at the tokens of a phrase, in every target that has it."""
    for row, words in enumerate(edit.targets):
        for copy in table[..., row, :].split(words.length, -1):
            copy[..., find_words(words, phrase)] = value
    if not any(find_words(words, phrase) for words in edit.targets):
        raise ValueError(
            f"{field} of P2P Attention Controller names {quoted(phrase)}, but the target prompt has the words "
            f"{_listed(*edit.targets)}: write one of them."
        )


def _listed(*prompts: Words) -> str:
    return shortened(" | ".join(dict.fromkeys(text for words in prompts for text in words.texts)), LISTED)
