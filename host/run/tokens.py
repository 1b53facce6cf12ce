"""A prompt's tokens as texts, read from the host's tokenizers: CLIP's, T5's and Qwen's."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from hashlib import sha256
from itertools import groupby, islice

from comfy.sd import CLIP
from comfy.sd1_clip import SD1Tokenizer, SDTokenizer
from comfy.text_encoders.flux import FluxTokenizer, KleinTokenizer, KleinTokenizer8B
from comfy.text_encoders.pixart_t5 import PixArtTokenizer
from comfy.text_encoders.qwen_image import QwenImageTokenizer
from comfy.text_encoders.sd3_clip import SD3Tokenizer
from comfy.text_encoders.z_image import ZImageTokenizer
from torch import Tensor

from ..words import END, START, UNKNOWN, Words, signs_of, words, words_between, words_of_both

T5 = "t5xxl"
TURN, TURN_END = "<|im_start|>", "<|im_end|>"
# Which turn of a chat the prompt is, and whether the model is given what stands before it.
CHATS = {
    QwenImageTokenizer: (1, False),
    ZImageTokenizer: (0, True),
    KleinTokenizer: (0, True),
    KleinTokenizer8B: (0, True),
}

Token = tuple[int | Tensor, float, int]
"""The host's: token or textual inversion vector, weight, stretch of the prompt; stretch 0 is start, end and padding."""


class Tokens:
    """Stands for a CLIP where nothing of it is wanted but how it divides prompts."""

    def __init__(self, tokenizer: SD1Tokenizer) -> None:
        self.tokenizer = tokenizer

    def tokenize(self, prompt: str, return_word_ids: bool) -> dict[str, list[list[Token]]]:
        return self.tokenizer.tokenize_with_weights(prompt, return_word_ids)


def prompt_words(clip: CLIP | Tokens, prompt: str, name: str, node: str = "Prompt Edit") -> Words:
    """The tokens and words of a prompt. Errors name it by `name`, and `node` as where to change it.

    Raises ValueError for text encoders whose words are not known, and where two of them divide the prompt differently.
    """
    tokens = clip.tokenize(prompt, return_word_ids=True)
    found = _words_of(clip, tokens, name, node)
    weights = (weight for chunks in tokens.values() for chunk in chunks for _, weight, _ in chunk)
    if wrong := [weight for weight in weights if not math.isfinite(weight)]:
        raise ValueError(
            f"The {name} prompt weighs a word by {wrong[0]:g}, of which no text encoder makes an embedding: in {node} "
            "write a number, as in (red:1.3)."
        )
    return found


def _words_of(clip: CLIP | Tokens, tokens: dict[str, list[list[Token]]], name: str, node: str) -> Words:
    kind = type(clip.tokenizer)
    if kind in CHATS:
        ((chunk,),) = tokens.values()
        return _in_chat(chunk, getattr(clip.tokenizer, clip.tokenizer.clip).inv_vocab, *CHATS[kind], name, node)
    if kind is FluxTokenizer:  # its CLIP reads the prompt as a whole, and the model none of its tokens
        return _of_t5(*tokens[T5], clip.tokenizer.t5xxl)
    if kind is PixArtTokenizer:
        return _of_t5(*tokens[T5], clip.tokenizer.clip_t5xxl)
    if kind is SD3Tokenizer:
        return _of_sd3(clip, tokens, name, node)
    tokenizers = [getattr(clip.tokenizer, f"clip_{key}", None) for key in tokens]
    if any(tokenizer is None or tokenizer.inv_vocab.get(tokenizer.start_token) != START for tokenizer in tokenizers):
        raise ValueError(
            f"{node} does not know the words of this text encoder ({kind.__name__}): connect the CLIP of an "
            "SD1.x, SD2.x, SDXL, SD3, Flux.1, Flux.2 klein, Chroma, Qwen-Image or Z-Image checkpoint."
        )
    return _of_clip([*tokens.values()], tokenizers[0], name, node)


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


def _of_clip(encoders: list[list[list[Token]]], tokenizer: SDTokenizer, name: str, node: str) -> Words:
    """Of CLIPs that read a prompt side by side."""
    chunks, *others = encoders
    if any(_places(other) != _places(chunks) for other in others):
        raise ValueError(
            f"The text encoders of this CLIP divide the {name} prompt into tokens differently: in {node} use "
            "encoders of one length, and textual inversions with as many vectors for each of them."
        )
    return words(_texts(chunks, tokenizer.inv_vocab))


def _of_t5(chunk: list[Token], tokenizer: SDTokenizer) -> Words:
    """Sentencepiece marks the blank before a word; one end token and padding follow the last."""
    inner = [token for token in chunk if token[2]]
    vocabulary = tokenizer.inv_vocab | {tokenizer.tokenizer.unk_token_id: UNKNOWN}
    pieces = [signs_of(text.replace("\u2581", " ")) for text in _inner_texts(inner, vocabulary, "")]
    tail = [vocabulary[token] for token, *_ in chunk[len(inner) :]]
    return words_between([*pieces, *tail], 0, len(tail))


def _of_sd3(clip: CLIP, tokens: dict[str, list[list[Token]]], name: str, node: str) -> Words:
    """CLIP's tokens, where any is loaded, and T5's behind them."""
    loaded, model = [], clip.cond_stage_model
    if model.clip_l is not None or model.clip_g is not None:
        loaded.append(_of_clip([tokens["g"], tokens["l"]], clip.tokenizer.clip_g, name, node))
    if model.t5xxl is not None:
        loaded.append(_of_t5(*tokens[T5], clip.tokenizer.t5xxl))
    return words_of_both(*loaded) if len(loaded) > 1 else loaded[0]


def _in_chat(chunk: list[Token], vocabulary: dict[int, str], turn: int, whole: bool, name: str, node: str) -> Words:
    """Of a prompt that a user says, behind the marks of the turn, "user" and a line's end."""
    pieces = [*_inner_texts(chunk, vocabulary, "")]
    turns = [i for i, piece in enumerate(pieces) if piece == TURN]
    if len(turns) <= turn or TURN_END not in pieces[turns[turn] :]:  # the host takes a chat that was typed as it is
        raise ValueError(
            f"The {name} prompt is a chat of its own ({TURN} ...) without the user's turn: in {node} type the "
            "prompt alone."
        )
    begin = turns[turn] + 3
    end = len(pieces) - 1 - pieces[::-1].index(TURN_END)
    first = 0 if whole else begin
    return words_between(pieces[first:], begin - first, len(pieces) - end)


def _places(chunks: list[list[Token]]) -> list[list[int | None]]:
    """What stands where, but padding, of which each encoder has its own; textual inversions whatever their values."""
    return [
        [None if isinstance(token, Tensor) else token for token, _, stretch in chunk if stretch] for chunk in chunks
    ]


def _texts(chunks: list[list[Token]], vocabulary: dict[int, str]) -> list[list[str]]:
    inner = [[token for token in chunk if token[2]] for chunk in chunks]
    texts = _inner_texts([token for tokens in inner for token in tokens], vocabulary, "</w>")
    return [
        [START, *islice(texts, len(tokens)), *[END] * (len(chunk) - 1 - len(tokens))]
        for chunk, tokens in zip(chunks, inner, strict=True)
    ]


def _inner_texts(tokens: list[Token], vocabulary: dict[int, str], end: str) -> Iterator[str]:
    """end: what marks a word's last piece."""
    for (_, is_vector), group in groupby(tokens, lambda token: (token[2], isinstance(token[0], Tensor))):
        stretch = [token for token, _, _ in group]
        if is_vector:  # one word, by whose name equal ones are recognised in the other prompt
            names = ",".join(sha256(vector.float().numpy().tobytes()).hexdigest()[:4] for vector in stretch)
            yield from re.split("(?=,)", f"<embedding:{names}>{end}")
        else:  # a start or end token that was typed is a word
            yield from (text + end * (text in (START, END)) for text in map(vocabulary.get, stretch))
