"""Word-level alignment of two prompts' tokens, and the matrix that carries attention from one to the other. Pure torch.

A prompt's tokens are the host tokenizer's: byte-pair pieces, of which the last of a word ends in "</w>", between one
start and one end token and padded to the encoder's length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Words(NamedTuple):
    """A prompt's words and where each stands among its tokens."""

    texts: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]  # [first, last) token of each word
    length: int  # tokens with padding


class PromptEdit(NamedTuple):
    """The PROMPT_EDIT socket: two aligned prompts.

    mapper: [source tokens, target tokens] fp32; row i says over which target tokens the source token i spreads.
    embeddings: the source and the target prompt's, [1, tokens, channels] each, by which they are recognised elsewhere.
    """

    source: Words
    target: Words
    mapper: Tensor
    embeddings: tuple[Tensor, Tensor]


def same_prompt(one: Tensor, other: Tensor) -> bool:
    """Whether two embeddings [b, tokens, channels] are a prompt's (1 % apart at most, as for another precision)."""
    return one.shape == other.shape and bool((one.to(other) - other).norm() <= 0.01 * other.norm())


def words(pieces: list[str]) -> Words:
    """The words of a prompt's token texts (all of them: start, pieces, end, padding)."""
    end = next(i for i, piece in enumerate(pieces) if piece == "<|endoftext|>")
    texts, spans, first = [], [], 1
    for i in range(1, end):
        if pieces[i].endswith("</w>") or i == end - 1:
            texts.append("".join(pieces[first : i + 1]).removesuffix("</w>"))
            spans.append((first, i + 1))
            first = i + 1
    return Words(tuple(texts), tuple(spans), len(pieces))


def swap_mapper(source: Words, target: Words) -> Tensor:
    """The word-swap matrix M of Prompt-to-Prompt (arXiv 2208.01626, section 3.2): [source.length, target.length] fp32.

    The edited map is A_source @ M. Words are paired in order; a word of s tokens swapped for one of t spreads each of
    its columns over all t (the identity where s = t). Every row sums to 1, so no attention mass is lost: the public
    code breaks this for tokens after a pair of unequal lengths. Raises ValueError where the word counts differ.
    """
    if len(source.texts) != len(target.texts):
        raise ValueError(
            f"Word swap replaces words one for one, but the source prompt has {len(source.texts)} words "
            f"({' | '.join(source.texts)}) and the target prompt {len(target.texts)} ({' | '.join(target.texts)}): "
            "write both with the same number of words in Prompt Edit; commas and other signs count."
        )
    mapper = torch.zeros(source.length, target.length)
    mapper[0, 0] = 1
    for (i, i_end), (j, j_end) in zip(source.spans, target.spans, strict=True):
        block = mapper[i:i_end, j:j_end]
        block.copy_(torch.eye(i_end - i) if i_end - i == j_end - j else torch.full_like(block, 1 / (j_end - j)))
    i, j = source.spans[-1][1], target.spans[-1][1]
    common = min(source.length - i, target.length - j)  # end token and padding
    mapper[range(i, i + common), range(j, j + common)] = 1
    mapper[i + common :, -1] = 1  # padding that the longer target prompt pushed out
    spread = target.length - j - common
    mapper[-1, target.length - 1 - spread :] = 1 / (spread + 1)  # padding that the shorter one has to spare
    return mapper
