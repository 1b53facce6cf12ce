"""Words of prompts on the host's own tokenizers for flow models: T5's, SD3's CLIP and T5, and Qwen's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from comfy.sd import CLIP
from comfy.text_encoders.ace15 import ACE15Tokenizer
from comfy.text_encoders.flux import FluxTokenizer, KleinTokenizer, KleinTokenizer8B
from comfy.text_encoders.hidream import HiDreamTokenizer
from comfy.text_encoders.lt import LTXVT5Tokenizer
from comfy.text_encoders.pixart_t5 import PixArtTokenizer
from comfy.text_encoders.qwen_image import QwenImageTEModel, QwenImageTokenizer
from comfy.text_encoders.sd3_clip import SD3ClipModel, SD3Tokenizer
from comfy.text_encoders.z_image import ZImageTokenizer
from torch import Tensor

from palimpsest.attention.alignment import carry_over, resolve
from palimpsest.attention.alignment_picture import draw, lines
from palimpsest.host.run.tokens import prompt_words
from palimpsest.host.words import Words, find_words, readable
from palimpsest.nodes.concepts import ConceptGuidance
from tiny import execute


def clip(tokenizer, **encoders: bool) -> CLIP:
    """The host's CLIP object with this tokenizer and no text encoder but for whether it has some."""
    made = CLIP.__new__(CLIP)
    made.tokenizer, made.tokenizer_options = tokenizer, {}
    loaded = {"clip_l": True, "clip_g": True, "t5xxl": True} | encoders
    made.cond_stage_model = SimpleNamespace(**{name: has or None for name, has in loaded.items()})
    return made


SD3 = SD3Tokenizer()
CLIPS = {
    "Flux": clip(FluxTokenizer()),
    "Chroma": clip(PixArtTokenizer()),
    "SD3": clip(SD3),
    "SD3 without CLIP": clip(SD3, clip_l=False, clip_g=False),
    "Qwen-Image": clip(QwenImageTokenizer()),
    "Z-Image": clip(ZImageTokenizer()),
    "Flux.2 klein 4B": clip(KleinTokenizer()),
    "Flux.2 klein 9B": clip(KleinTokenizer8B()),
}
BEFORE = {
    "SD3": 1,
    "Z-Image": 3,
    "Flux.2 klein 4B": 3,
    "Flux.2 klein 9B": 3,
}  # a start token, and the chat that this model is given too
each_clip = pytest.mark.parametrize("name", CLIPS)


def read(name: str, prompt: str) -> Words:
    return prompt_words(CLIPS[name], prompt, "source")


@each_clip
def test_words_of_a_prompt(name: str) -> None:
    """Whatever the pieces, words are those of CLIP's tokenizer, and each token of the prompt is one's."""
    found = read(name, "a Checkered squirrel's  well-lit hat! 35mm, 1990s")
    expected = ("a", "checkered", "squirrel", "'s", "well", "-", "lit", "hat", "!", "35", "mm", ",", "1990", "s")
    assert found.texts == expected
    tokens = [token for word in found.tokens for token in word]
    assert len(tokens) == len(set(tokens))
    others = {token for special in found.specials for part in special for token in part}
    assert others == set(range(found.length)) - set(tokens)
    for head, tail in found.specials:
        assert list(head) + sorted(t for t in tokens if head.stop <= t < tail.start) == list(
            range(head.start, tail.start)
        )
    assert found.specials[0].head == range(BEFORE.get(name, 0))
    assert len(find_words(found, "well-lit")) == sum(map(len, found.tokens[4:7]))


@each_clip
def test_pieces_of_a_word_are_its_letters(name: str) -> None:
    found = read(name, "a photo of a Labrador retriever, antidisestablishmentarianism")
    for encoder in found.encoders:
        for text, tokens in zip(found.texts, found.tokens, strict=True):
            pieces = "".join(readable(found.pieces[token]) for token in tokens if token in encoder)
            assert pieces.strip().lower() == text


def test_lengths() -> None:
    """As long as the conditionings: padded to 256, 77 of CLIP before 77 or more of T5, or the prompt with its ends."""
    lengths = {name: [read(name, "cat " * n).length for n in (1, 100, 300)] for name in CLIPS}
    assert lengths["Flux"] == [256, 256, 301]
    assert lengths["Chroma"] == [2, 101, 301]
    assert lengths["SD3"] == [77 + 77, 2 * 77 + 101, 4 * 77 + 301]
    assert lengths["SD3 without CLIP"] == [77, 101, 301]
    assert lengths["Qwen-Image"] == [1 + 6, 100 + 6, 300 + 6]
    assert lengths["Z-Image"] == [1 + 9, 100 + 9, 300 + 9]
    assert lengths["Flux.2 klein 4B"] == lengths["Flux.2 klein 9B"] == [512, 512, 512]
    assert read("Flux.2 klein 4B", "cat " * 600).length == 600 + 13


def test_the_hosts_model_cuts_the_chat_where_words_begin() -> None:
    """Qwen-Image's text encoder gives its model what the user says and what follows."""
    tokens = CLIPS["Qwen-Image"].tokenize("a cat on a mat")
    (row,) = tokens["qwen25_7b"]

    class Encoder(QwenImageTEModel):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.clip = "encoder"

        def encoder_tokens(self, row: list) -> tuple[Tensor, None, dict]:
            values = torch.tensor([float(token) for token, _ in row])[None, :, None]
            return values, None, {"attention_mask": torch.ones(1, len(row))}

    encoder = Encoder()
    encoder.clip_name = "qwen25_7b"
    encoder.encoder = SimpleNamespace(encode_token_weights=lambda rows: encoder.encoder_tokens(rows[0]))
    given, _, _ = encoder.encode_token_weights(tokens)
    vocabulary = CLIPS["Qwen-Image"].tokenizer.qwen25_7b.inv_vocab
    found = read("Qwen-Image", "a cat on a mat")
    assert [vocabulary[int(token)] for token in given[0, :, 0]] == list(found.pieces)


def test_the_hosts_model_gives_clip_before_t5() -> None:
    """SD3's text encoder cuts CLIPs to the shorter, and leaves out those that are not loaded."""
    model = SD3ClipModel(clip_l=False, clip_g=False, t5=False)
    model.t5_attention_mask = False

    def encoding(width: int) -> Callable:
        return lambda rows: (torch.zeros(1, sum(map(len, rows)), width), torch.zeros(1, width))

    for part, width in (("clip_l", 768), ("clip_g", 1280), ("t5xxl", 4096)):
        setattr(model, part, SimpleNamespace(encode_token_weights=encoding(width)))
    for name, parts in (("SD3", ()), ("SD3 without CLIP", ("clip_l", "clip_g"))):
        for part in parts:
            setattr(model, part, None)
        for prompt in ("a cat", "cat " * 100):
            output, _, _ = model.encode_token_weights(CLIPS[name].tokenize(prompt))
            assert output.shape[1] == read(name, prompt).length


def test_what_t5_has_no_piece_for() -> None:
    """Part of its word; in SD3 words are CLIP's."""
    assert read("Chroma", "a naïve 猫").texts == ("a", "na\ufffdve", "\ufffd")
    found = read("SD3", "a naïve 猫 cat")
    assert found.texts == ("a", "naïve", "猫", "cat")
    assert all(any(token in encoder for token in word) for word in found.tokens for encoder in found.encoders)


def test_an_embedding_is_a_word(tmp_path) -> None:
    """Known by its values; in SD3 each text encoder has vectors of its own."""
    vectors = {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280), "t5xxl": torch.randn(3, 4096)}
    torch.save(vectors, tmp_path / "thing.pt")
    prompt = "a embedding:thing, on a mat"
    found = prompt_words(clip(PixArtTokenizer(embedding_directory=str(tmp_path))), prompt, "source")
    assert found.texts[0] == "a"
    assert found.texts[1].startswith("<embedding:")
    assert found.texts[2:] == (",", "on", "a", "mat")
    assert found.tokens[1] == (2, 3, 4)
    found = prompt_words(clip(SD3Tokenizer(embedding_directory=str(tmp_path))), prompt, "source")
    assert found.texts[2:] == (",", "on", "a", "mat")
    assert found.tokens[1] == (2, 3, 77 + 2, 77 + 3, 77 + 4)


@each_clip
def test_weights_divide_words_as_they_are(name: str) -> None:
    plain, weighted = read(name, "a red cat, sat"), read(name, "a (red:1.3) cat, sat")
    if name.startswith(("Qwen", "Z-Image", "Flux.2")):
        assert weighted.texts == ("a", "(", "red", ":", "1", ".", "3", ")", "cat", ",", "sat")
    else:
        assert weighted.texts == plain.texts


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_a_weight_that_is_no_number_is_refused(weight: str) -> None:
    """It was found out while sampling, as another target prompt. Where weights are words, so is this."""
    with pytest.raises(
        ValueError, match=f"The target prompt weighs a word by {weight}, .* in Prompt Edit write a number"
    ):
        prompt_words(CLIPS["Flux"], f"a (red:{weight}) cat", "target")
    assert "red" in read("Z-Image", f"a (red:{weight}) cat").texts


@each_clip
@pytest.mark.parametrize("alignment", ["swap", "refine"])
def test_all_attention_is_handed_on(name: str, alignment: str) -> None:
    """Words of other lengths, in prompts of other lengths: rows sum to 1, but for words that refining drops."""
    source = read(name, "a photo of a cat on a bench")
    target = read(name, "a photo of a labrador retriever on a bench, watercolor")
    carry = carry_over(source, target, alignment)
    sums = carry.source.sum(1)
    dropped = [token for i, text in enumerate(source.texts) if text == "cat" for token in source.tokens[i]]
    kept = torch.ones(source.length)
    if alignment == "refine":
        kept[dropped] = 0
    torch.testing.assert_close(sums, kept)
    for one, other in zip(source.encoders, target.encoders, strict=True):  # and to tokens of the same text encoder
        assert carry.source[one.start : one.stop, other.start : other.stop].sum() == pytest.approx(
            carry.source[one.start : one.stop].sum()
        )
    assert carry.source[:, list(find_words(target, "bench"))].sum() == len(find_words(source, "bench"))


@each_clip
def test_auto_and_the_picture(name: str) -> None:
    source, target = read(name, "a cat on a mat"), read(name, "a labrador on a mat")
    assert resolve(source, target, "auto") == "swap"
    assert resolve(source, read(name, "a big cat on a mat"), "auto") == "refine"
    labels = [line.label for line in lines(source)]
    assert "".join(labels).replace(" ", "").count("acatonamat") == len(source.encoders)
    assert labels.count("end") == len(source.encoders)
    assert draw(source, target, carry_over(source, target, "swap")).min() < 0.5


@pytest.mark.parametrize("tokenizer", [HiDreamTokenizer, LTXVT5Tokenizer, ACE15Tokenizer])
def test_other_text_encoders_are_named(tokenizer: type) -> None:
    """Also where what they make of a prompt is more than tokens."""
    expected = rf"does not know the words of this text encoder \({tokenizer.__name__}\): connect the CLIP of an SD1.x"
    with pytest.raises(ValueError, match=expected):
        prompt_words(clip(tokenizer()), "a cat", "source")


@pytest.mark.parametrize("chat", ["user\na cat<|im_end|>\n", "system\nx<|im_end|>\n<|im_start|>user\na cat"])
def test_a_chat_without_the_users_turn_is_refused(chat: str) -> None:
    with pytest.raises(ValueError, match=r"source prompt is a chat of its own \(<\|im_start\|> ...\) without the user"):
        read("Qwen-Image", f"<|im_start|>{chat}")


def test_concept_guidance_is_named_where_it_reads_the_words() -> None:
    with pytest.raises(ValueError, match=r"Concept Guidance does not know the words of this text encoder \(HiDream"):
        execute(ConceptGuidance, model=None, clip=clip(HiDreamTokenizer()))
    with pytest.raises(ValueError, match="The concept prompt is a chat .* in Concept Guidance type the prompt alone"):
        execute(ConceptGuidance, model=None, clip=CLIPS["Qwen-Image"], concept="<|im_start|>user\na cat")
