"""A prompt's tokens as texts, read from the host's CLIP tokenizers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import sha256
from itertools import groupby, islice

from comfy.sd import CLIP
from comfy.sd1_clip import SD1Tokenizer
from torch import Tensor

from ..words import END, START, Words, words

Token = tuple[int | Tensor, float, int]
"""The host's: token or textual inversion vector, weight, stretch of the prompt; stretch 0 is start, end and padding."""


class Tokens:
    """Stands for a CLIP where nothing of it is wanted but how it divides prompts."""

    def __init__(self, tokenizer: SD1Tokenizer) -> None:
        self.tokenizer = tokenizer

    def tokenize(self, prompt: str, return_word_ids: bool) -> dict[str, list[list[Token]]]:
        return self.tokenizer.tokenize_with_weights(prompt, return_word_ids)


def prompt_words(clip: CLIP | Tokens, prompt: str, name: str) -> Words:
    """The tokens and words of a prompt, which `name` names in errors.

    Raises ValueError for text encoders that are not CLIP, and where two of them divide the prompt differently.
    """
    tokens = clip.tokenize(prompt, return_word_ids=True)
    tokenizers = [getattr(clip.tokenizer, f"clip_{key}", None) for key in tokens]
    if None in tokenizers:
        raise ValueError(
            "Prompt Edit needs a CLIP text encoder: connect the CLIP of an SD1.x, SD2.x or SDXL checkpoint."
        )
    chunks, *others = tokens.values()
    if any(_places(other) != _places(chunks) for other in others):
        raise ValueError(
            f"The text encoders of this CLIP divide the {name} prompt into tokens differently: in Prompt Edit use "
            "encoders of one length, and textual inversions with as many vectors for each of them."
        )
    return words(_texts(chunks, tokenizers[0].inv_vocab))


def unknown_words(clip: CLIP | Tokens, *prompts: Words) -> list[str]:
    """The words of prompts that the text encoder was not trained on, as far as its tokenizer tells."""
    known = getattr(clip.tokenizer, "known", None)
    if known is None:
        return []
    vocabulary = clip.tokenizer.clip_l.inv_vocab
    pieces = {vocabulary[token] for token in known}
    found = [
        text
        for words in prompts
        for text, tokens in zip(words.texts, words.tokens, strict=True)
        if not pieces.issuperset(words.pieces[i] for i in tokens)
    ]
    return list(dict.fromkeys(found))


def _places(chunks: list[list[Token]]) -> list[list[int | None]]:
    """What stands where, but padding, of which each encoder has its own; textual inversions whatever their values."""
    return [
        [None if isinstance(token, Tensor) else token for token, _, stretch in chunk if stretch] for chunk in chunks
    ]


def _texts(chunks: list[list[Token]], vocabulary: dict[int, str]) -> list[list[str]]:
    inner = [[token for token in chunk if token[2]] for chunk in chunks]
    texts = _inner_texts([token for tokens in inner for token in tokens], vocabulary)
    return [
        [START, *islice(texts, len(tokens)), *[END] * (len(chunk) - 1 - len(tokens))]
        for chunk, tokens in zip(chunks, inner, strict=True)
    ]


def _inner_texts(tokens: list[Token], vocabulary: dict[int, str]) -> Iterator[str]:
    for (_, is_vector), group in groupby(tokens, lambda token: (token[2], isinstance(token[0], Tensor))):
        stretch = [token for token, _, _ in group]
        if is_vector:  # one word, by whose name equal ones are recognised in the other prompt
            names = ",".join(sha256(vector.float().numpy().tobytes()).hexdigest()[:4] for vector in stretch)
            yield from re.split("(?=,)", f"<embedding:{names}></w>")
        else:  # a start or end token that was typed is a word
            yield from (text + "</w>" * (text in (START, END)) for text in map(vocabulary.get, stretch))
