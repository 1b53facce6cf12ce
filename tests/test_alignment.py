"""Word alignment and the mapper matrix, on the host's own tokenizers."""

from __future__ import annotations

import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.text_encoders.sd2_clip
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from palimpsest.attention.alignment import Words, swap_mapper, words
from palimpsest.host.tokens import token_texts
from tiny import pieces

VOCABULARY = ["cat", "squirrel", "lasagne", "checkered", "a", "red", "photorealistic", "naïve", "3d", "chiaroscuro"]


class Clip:
    """The part of the host's CLIP object that tokenizing uses, around a real tokenizer."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def read(self, prompt: str) -> Words:
        return words(token_texts(self, self.tokenizer.tokenize_with_weights(prompt), "source"))


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip(comfy.sd1_clip.SD1Tokenizer())


def mapper(clip: Clip, source: str, target: str) -> torch.Tensor:
    return swap_mapper(clip.read(source), clip.read(target))


def test_words_of_a_prompt(clip: Clip) -> None:
    read = clip.read("a checkered, (red:1.3) squirrel!")
    assert read.texts == ("a", "checkered", ",", "red", "squirrel", "!")
    assert read.spans == ((1, 2), (2, 4), (4, 5), (5, 6), (6, 7), (7, 8))
    assert read.length == 77


@pytest.mark.parametrize(
    "tokenizer", [comfy.sdxl_clip.SDXLTokenizer, comfy.text_encoders.sd2_clip.SD2Tokenizer], ids=["sdxl", "sd2"]
)
def test_other_tokenizers_give_the_same_words(clip: Clip, tokenizer: type) -> None:
    prompt = "a lasagne on a checkered table"
    assert Clip(tokenizer()).read(prompt) == clip.read(prompt)


def test_published_code_misplaces_tokens_after_an_unequal_pair(clip: Clip) -> None:
    """A word of 1 token swapped for one of 2 shifts all that follow; each later word must still map to itself."""
    swapped = mapper(clip, "a striped cat on a mat", "a checkered cat on a mat")
    source, target = clip.read("a striped cat on a mat"), clip.read("a checkered cat on a mat")
    assert source.spans[1] == (2, 3)
    assert target.spans[1] == (2, 4)
    assert swapped[2, 2:4].tolist() == [0.5, 0.5]
    for (i, _), (j, _) in zip(source.spans[2:], target.spans[2:], strict=True):
        assert swapped[i, j] == 1
        assert swapped[:, j].sum() == 1


def test_formula_written_out() -> None:
    """Two target tokens for one source token, in a text of 7: start, a, b c, end and padding; the last row folds."""
    one, other = words(pieces("x y", 7)), words(pieces("x b|c", 7))
    expected = torch.zeros(7, 7)
    expected[0, 0] = expected[1, 1] = 1
    expected[2, 2] = expected[2, 3] = 0.5
    expected[3, 4] = expected[4, 5] = expected[5, 6] = expected[6, 6] = 1
    assert torch.equal(swap_mapper(one, other), expected)
    back = torch.zeros(7, 7)
    back[0, 0] = back[1, 1] = back[2, 2] = back[3, 2] = 1
    back[4, 3] = back[5, 4] = 1
    back[6, 5] = back[6, 6] = 0.5
    assert torch.equal(swap_mapper(other, one), back)


prompts = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), source=prompts)
def test_every_row_conserves_mass_and_kept_words_map_to_themselves(data: st.DataObject, source: list[str]) -> None:
    clip = Clip(TOKENIZER)
    target = [data.draw(st.sampled_from([word, *VOCABULARY])) for word in source]
    one, other = clip.read(" ".join(source)), clip.read(" ".join(target))
    assume(len(one.texts) == len(other.texts))
    matrix = swap_mapper(one, other)
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(77))
    for (i, i_end), (j, j_end), a, b in zip(one.spans, other.spans, one.texts, other.texts, strict=True):
        if a == b:
            assert torch.equal(matrix[i:i_end, j:j_end], torch.eye(i_end - i))


TOKENIZER = comfy.sd1_clip.SD1Tokenizer()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), source=prompts)
def test_swap_and_swap_back_is_the_identity_on_words(data: st.DataObject, source: list[str]) -> None:
    clip = Clip(TOKENIZER)
    target = [data.draw(st.sampled_from([word, *VOCABULARY])) for word in source]
    one, other = clip.read(" ".join(source)), clip.read(" ".join(target))
    assume(len(one.texts) == len(other.texts))
    back = swap_mapper(one, other) @ swap_mapper(other, one)
    for i, i_end in one.spans:
        torch.testing.assert_close(back[i:i_end].sum(1), torch.ones(i_end - i))
        torch.testing.assert_close(back[i:i_end, i:i_end].sum(), torch.tensor(float(i_end - i)))


def test_equal_prompts_give_the_identity(clip: Clip) -> None:
    assert torch.equal(mapper(clip, "a cat on a mat", "a cat on a mat"), torch.eye(77))


def test_bad_prompts_are_refused_in_a_sentence(clip: Clip) -> None:
    with pytest.raises(ValueError, match="source prompt is empty"):
        clip.read("")
    with pytest.raises(ValueError, match="source prompt is empty"):
        clip.read("   ")
    for tokenizer in (clip, Clip(comfy.sdxl_clip.SDXLTokenizer())):
        with pytest.raises(ValueError, match="source prompt has 80 tokens, but 75 fit"):
            tokenizer.read("cat " * 80)
    with pytest.raises(ValueError, match=r"has 2 words \(a \| cat\) and the target prompt 3 \(a \| red \| cat\)"):
        mapper(clip, "a cat", "a red cat")


def test_embeddings_are_words_of_their_own(clip: Clip) -> None:
    tokens = clip.tokenizer.tokenize_with_weights("a cat")
    tokens["l"][0][2] = (torch.zeros(768), 1.0)
    assert words(token_texts(clip, tokens, "source")).texts == ("a", "<embedding 2>")
