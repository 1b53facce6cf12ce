"""A prompt's tokens and words, as texts. Needs neither torch nor the host.

CLIP's tokens come in chunks of equal length: one start token, byte-pair pieces, of which the last of a word ends in
"</w>", and the tail, which is one end token and padding. Other tokenizers' pieces hold the blanks between words, and
the end of a prompt is told by its length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import chain, pairwise
from string import punctuation, whitespace
from typing import NamedTuple

START, END = "<|startoftext|>", "<|endoftext|>"

# Byte-pair pieces write each byte of the text as one sign: these bytes as the signs from 256 on, all others as Latin-1.
_BYTES = dict(enumerate([*range(33), *range(127, 161), 173], 256))
_SIGNS = {byte: sign for sign, byte in _BYTES.items()}

UNKNOWN = "\ufffd"  # stands for what a tokenizer has no piece for
# What CLIP's tokenizer takes for a word, digits in a row as one, and a textual inversion.
_WORD = re.compile(
    r"<embedding:[\da-f,]*>|'(?:s|t|re|ve|m|ll|d)\b|(?:[^\W\d_]|\ufffd)+|\d+|(?:(?!\ufffd)[^\w\s]|_)+", re.IGNORECASE
)


class Special(NamedTuple):
    """Tokens around words that are no word's: those before them, a start token or a template, and those behind, an end
    token and padding.
    """

    head: range
    tail: range


class Words(NamedTuple):
    """A prompt's tokens and words.

    pieces: the texts of all tokens, chunk after chunk. tokens: where each word's are among them. specials: of each
    chunk. encoders: where the tokens of each text encoder are, all of which read the same words.
    """

    pieces: tuple[str, ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    specials: tuple[Special, ...]
    encoders: tuple[range, ...]

    @property
    def length(self) -> int:
        return len(self.pieces)


def readable(pieces: str) -> str:
    return bytes_of(pieces.removesuffix("</w>")).decode(errors="replace")


def bytes_of(pieces: str) -> bytes:
    return pieces.translate(_BYTES).encode("latin-1")


def signs_of(text: str) -> str:
    """A text as byte-pair pieces write it."""
    return text.encode().decode("latin-1").translate(_SIGNS)


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
    starts = range(0, len(pieces), length)
    specials = (Special(range(i, i + 1), range(pieces.index(END, i), i + length)) for i in starts)
    return Words(pieces, tuple(texts), tuple(tokens), tuple(specials), (range(len(pieces)),))


def words_between(pieces: Sequence[str], head: int, tail: int) -> Words:
    """The words of a prompt's token texts, between so many tokens before and behind them.

    A piece is of the word that its first sign is in, and blanks are of the word that follows.
    """
    inner = range(head, len(pieces) - tail)
    text = b"".join(bytes_of(pieces[i]) for i in inner).decode(errors="replace")
    found = [(match.start(), match.end()) for match in _WORD.finditer(text)]
    tokens: list[list[int]] = [[] for _ in found]
    before, at = b"", 0
    for i in inner:
        begins = len(before.decode(errors="ignore"))
        while at + 1 < len(found) and found[at][1] <= begins:
            at += 1
        if found:
            tokens[at].append(i)
        before += bytes_of(pieces[i])
    texts: list[str] = []
    kept: list[tuple[int, ...]] = []
    for (begin, end), own in zip(found, tokens, strict=True):
        if own:  # or else the word is part of the last one's piece
            texts.append("")
            kept.append(tuple(own))
        texts[-1] += text[begin:end].lower()
    special = Special(range(head), range(inner.stop, len(pieces)))
    return Words(tuple(pieces), tuple(texts), tuple(kept), (special,), (range(len(pieces)),))


def words_of_both(one: Words, other: Words) -> Words:
    """The words of one prompt that two text encoders read, the tokens of the second behind those of the first.

    Texts are those of the first. Where the two do not divide it alike, what the second has more is the last word's.
    """
    texts, tokens = [], []
    for _, i, end_i, j, end_j in SequenceMatcher(None, one.texts, other.texts, autojunk=False).get_opcodes():
        ones = [*zip(one.texts[i:end_i], one.tokens[i:end_i], strict=True)]
        others = [tuple(token + one.length for token in word) for word in other.tokens[j:end_j]]
        if not ones:
            texts += other.texts[j:end_j]
            tokens += others
            continue
        if len(others) > len(ones):
            others[len(ones) - 1 :] = [tuple(chain.from_iterable(others[len(ones) - 1 :]))]
        others += [()] * (len(ones) - len(others))
        texts += [text for text, _ in ones]
        tokens += [word + more for (_, word), more in zip(ones, others, strict=True)]

    def moved(tokens: range) -> range:
        return range(tokens.start + one.length, tokens.stop + one.length)

    specials = (Special(moved(head), moved(tail)) for head, tail in other.specials)
    return Words(
        one.pieces + other.pieces,
        tuple(texts),
        tuple(tokens),
        (*one.specials, *specials),
        (*one.encoders, *map(moved, other.encoders)),
    )


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
