"""A prompt's tokens and words, as texts. Pure torch.

The tokens are the host tokenizer's, in chunks of equal length: one start token, byte-pair pieces, of which the last of
a word ends in "</w>", and the tail, which is one end token and padding.
"""

from __future__ import annotations

from itertools import chain, pairwise
from string import punctuation, whitespace
from typing import NamedTuple

START, END = "<|startoftext|>", "<|endoftext|>"

# Byte-pair pieces write each byte of the text as one sign: these bytes as the signs from 256 on, all others as Latin-1.
_BYTES = dict(enumerate([*range(33), *range(127, 161), 173], 256))


class Words(NamedTuple):
    """A prompt's tokens and words.

    pieces: the texts of all tokens, chunk after chunk. tokens: where each word's are among them. chunk: tokens in one.
    """

    pieces: tuple[str, ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    chunk: int

    @property
    def length(self) -> int:
        return len(self.pieces)


class Special(NamedTuple):
    """The tokens of a chunk that are no word's: its start token, and its end token with the padding."""

    start: int
    tail: range


def readable(pieces: str) -> str:
    return pieces.removesuffix("</w>").translate(_BYTES).encode("latin-1").decode(errors="replace")


def words(chunks: list[list[str]]) -> Words:
    """The words of a prompt's token texts, by chunk. A word may go on in the next chunk.

    The tokenizer ends a word at every digit; here digits in a row are one number ("3 5" too: it reads as "35" does).
    """
    pieces = tuple(chain.from_iterable(chunks))
    length = len(chunks[0])
    inner = [k * length + i for k, chunk in enumerate(chunks) for i in range(1, chunk.index(END))]
    ends = [n for n, i in enumerate(inner, 1) if pieces[i].endswith("</w>")]
    texts: list[str] = []
    tokens: list[tuple[int, ...]] = []
    for word in (tuple(inner[first:end]) for first, end in pairwise([0, *ends])):
        text = readable("".join(pieces[i] for i in word))
        if text.isdecimal() and texts and texts[-1].isdecimal():
            texts[-1] += text
            tokens[-1] += word
        else:
            texts.append(text)
            tokens.append(word)
    return Words(pieces, tuple(texts), tuple(tokens), length)


def specials(words: Words) -> list[Special]:
    starts = range(0, words.length, words.chunk)
    return [Special(i, range(words.pieces.index(END, i), i + words.chunk)) for i in starts]


def find_words(words: Words, phrase: str) -> tuple[int, ...]:
    """The tokens of every occurrence of a phrase, a word or several in a row; () where there is none.

    Case and the signs around the phrase do not matter, unless it is nothing but signs.
    """
    return _occurrences(words, phrase.strip(punctuation + whitespace)) or _occurrences(words, phrase)


def _occurrences(words: Words, phrase: str) -> tuple[int, ...]:
    found: set[int] = set()
    for first in range(len(words.texts)):
        end = first
        for part in phrase.lower().split():
            text = ""  # one part may be several words: "well-lit", "3d"
            while len(text) < len(part) and end < len(words.texts):
                text += words.texts[end]
                end += 1
            if text != part:
                break
        else:
            found.update(*words.tokens[first:end])
    return tuple(sorted(found))
