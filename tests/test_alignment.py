"""Alignment of two prompts and the attention that it carries over, on the host's own tokenizers."""

from __future__ import annotations

import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.text_encoders.sd2_clip
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from palimpsest.attention import alignment_picture
from palimpsest.attention.alignment import SIMILAR, Carry, PromptEdit, align, carry_over, join, resolve
from palimpsest.host.run.tokens import prompt_words
from palimpsest.host.words import Words, find_words, words
from palimpsest.nodes.prompt import BatchPromptEdits
from tiny import pieces

VOCABULARY = ["cat", "squirrel", "lasagne", "checkered", "a", "red", "photorealistic", "naïve", "3d", "chiaroscuro"]
VOCABULARY += [",", "mat.", "(red:1.3)", "well-lit", "it's", "猫", "antidisestablishmentarianismlike"]


class Clip:
    """The part of the host's CLIP object that tokenizing uses, around a real tokenizer."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def tokenize(self, prompt: str, return_word_ids: bool = False) -> dict:
        return self.tokenizer.tokenize_with_weights(prompt, return_word_ids)

    def read(self, prompt: str) -> Words:
        return prompt_words(self, prompt, "source")


SD1 = Clip(comfy.sd1_clip.SD1Tokenizer())
SDXL = Clip(comfy.sdxl_clip.SDXLTokenizer())
SD2 = Clip(comfy.text_encoders.sd2_clip.SD2Tokenizer())
each_clip = pytest.mark.parametrize("clip", [SD1, SDXL, SD2], ids=["sd1", "sdxl", "sd2"])


def carried(source: str, target: str, alignment: str) -> Carry:
    return carry_over(SD1.read(source), SD1.read(target), alignment)


def inner(prompt: Words) -> list[int]:
    return [token for word in prompt.tokens for token in word]


def outer(prompt: Words) -> list[int]:
    return [token for token in range(prompt.length) if token not in set(inner(prompt))]


# --- words -----------------------------------------------------------------------------------------------------------


@each_clip
def test_words_of_a_prompt(clip: Clip) -> None:
    read = clip.read("a Checkered,  (red:1.3) squirrel!")
    assert read.texts == ("a", "checkered", ",", "red", "squirrel", "!")
    assert read.tokens == ((1,), (2, 3), (4,), (5,), (6,), (7,))
    assert read.pieces[:5] == ("<|startoftext|>", "a</w>", "chec", "kered</w>", ",</w>")
    assert read.pieces[8:] == ("<|endoftext|>",) * 69
    assert (read.length, read.encoders) == (77, (range(77),))
    assert read.specials == ((range(1), range(8, 77)),)


def test_words_are_readable_in_any_script() -> None:
    assert SD1.read("naïve 猫 🐱").texts == ("naïve", "猫", "🐱")


@each_clip
def test_digits_in_a_row_are_one_number(clip: Clip) -> None:
    read = clip.read("(35:1.2)mm, f/1.8, 1990s ٣٥ x²")
    assert read.texts == ("35", "mm", ",", "f", "/", "1", ".", "8", ",", "1990", "s", "٣٥", "x", "²")
    assert read.tokens[:3] == ((1, 2), (3,), (4,))
    assert read.tokens[9] == (11, 12, 13, 14)


@each_clip
def test_a_typed_end_token_does_not_end_the_prompt(clip: Clip) -> None:
    assert clip.read("a <|endoftext|> cat").texts == ("a", "<|endoftext|>", "cat")


@each_clip
def test_words_of_several_chunks(clip: Clip) -> None:
    """The host fills a chunk to its last place and goes on in the next, amid a word if need be."""
    read = clip.read("cat " * 74 + "checkered mat")
    assert read.length == 154
    assert read.texts[-2:] == ("checkered", "mat")
    assert read.tokens[-2:] == ((75, 78), (79,))
    assert read.specials == ((range(1), range(76, 77)), (range(77, 78), range(80, 154)))
    assert clip.read("cat " * 151).length == 231


def test_a_short_weighted_part_is_not_broken_over_chunks() -> None:
    read = SD1.read("cat " * 74 + "(checkered mat:1.2)")
    assert read.tokens[-2:] == ((78, 79), (80,))
    assert read.specials[0] == (range(1), range(75, 77))


@pytest.fixture
def embedding_folder(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def save(name: str, **sizes: tuple[int, int]) -> None:
        torch.save(
            {key: torch.randn(size, generator=generator) for key, size in sizes.items()}, tmp_path / f"{name}.pt"
        )

    save("one", clip_l=(1, 768), clip_g=(1, 1280))
    save("three", clip_l=(3, 768), clip_g=(3, 1280))
    save("uneven", clip_l=(3, 768), clip_g=(2, 1280))
    save("ten", clip_l=(10, 768), clip_g=(10, 1280))
    return str(tmp_path)


@pytest.mark.parametrize("tokenizer", [comfy.sd1_clip.SD1Tokenizer, comfy.sdxl_clip.SDXLTokenizer])
def test_an_embedding_is_a_word(tokenizer: type, embedding_folder: str) -> None:
    clip = Clip(tokenizer(embedding_directory=embedding_folder))
    read = clip.read("a embedding:three embedding:one cat")
    assert read.tokens == ((1,), (2, 3, 4), (5,), (6,))
    assert read.texts[1].startswith("<embedding:")
    again = clip.read("embedding:three a cat embedding:one")
    assert (again.texts[0], again.texts[3]) == (read.texts[1], read.texts[2])
    assert read.texts[1] != read.texts[2]
    assert find_words(read, read.texts[1]) == (2, 3, 4)
    assert clip.read("cat " * 70 + "embedding:ten").tokens[-1] == (71, 72, 73, 74, 75, 78, 79, 80, 81, 82)
    swap = carry_over(clip.read("a cat embedding:one"), clip.read("a cat embedding:three"), "swap")
    assert swap.source[3, 3:6].tolist() == pytest.approx([1 / 3] * 3)


# --- finding words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "phrase", "tokens"),
    [
        ("a cat, red", "cat", (2,)),
        ("a cat, red", "cat,", (2,)),
        ("a cat, red", " Cat ", (2,)),
        ("The Cat", "the cat", (1, 2)),
        ("a  red   cat", "red  cat", (2, 3)),
        ("a red, cat", "red cat", ()),
        ("a cat and a cat", "cat", (2, 5)),
        ("a cat and a cat", "a cat", (1, 2, 4, 5)),
        ("cat cat cat", "cat cat", (1, 2, 3)),
        ("a checkered cat", "checkered", (2, 3)),
        ("a checkered cat", "check", ()),
        ("a catnip", "cat", ()),
        ("a well-lit 3d cat", "well-lit 3d", (2, 3, 4, 5, 6)),
        ("it's a cat", "it's", (1, 2)),
        ("a car pet", "carpet", (2, 3)),
        ("a carpet", "car pet", ()),
        ("a cat, red", ",", (3,)),
        ("a naïve CAT", "Naïve", (2, 3, 4)),
        ("a 35mm photo", "35mm", (2, 3, 4)),
        ("a 35mm photo", "35", (2, 3)),
        ("a 35mm photo", "5", ()),
        ("a cat", "dog", ()),
        ("a cat", "", ()),
        ("a cat", " , ", ()),
        ("a cat", "cat dog", ()),
        ("cat " * 80, "cat", (*range(1, 76), *range(78, 83))),
    ],
)
def test_find_words(prompt: str, phrase: str, tokens: tuple[int, ...]) -> None:
    assert find_words(SD1.read(prompt), phrase) == tokens


# --- alignment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "pairs"),
    [
        ("abc", "abc", [(0, 0), (1, 1), (2, 2)]),
        ("abc", "axc", [(0, 0), (2, 2)]),
        ("", "abc", []),
        ("ab", "aab", [(0, 1), (1, 2)]),  # neighbours stay neighbours
        ("ab", "abb", [(0, 0), (1, 1)]),
        ("ab", "axbyab", [(0, 4), (1, 5)]),
        ("abcd", "axbcxcd", [(0, 0), (1, 2), (2, 3), (3, 6)]),  # but never at the cost of a pair
        ("a", "aba", [(0, 0)]),  # the first of equals
        ("ab", "ba", [(1, 0)]),
    ],
)
def test_align(source: str, target: str, pairs: list[tuple[int, int]]) -> None:
    assert align(source, target) == pairs


@pytest.mark.parametrize(
    ("source", "target", "alignment"),
    [
        ("a cat on a mat", "a cat on a mat", "swap"),
        ("a striped cat on a mat", "a checkered cat on a mat", "swap"),
        ("a red cat, asleep", "a blue dog, asleep", "swap"),
        ("a cat on a mat", "a cat on a mat, watercolor", "refine"),
        ("a big red cat", "a red dog", "refine"),
        ("a cat, red", "a cat red", "refine"),
        ("a cat", "", "refine"),
        ("red cat red dog", "red dog blue dog", "swap"),  # though "red dog" is in both, in a row
        ("red dog blue dog", "red cat red dog", "swap"),
        ("a small dog and a cat", "a cat and a small dog", "refine"),
        ("cat " * 80 + "sits", "cat " * 80 + "runs", "swap"),
        ("a 35mm photo", "a 50mm photo", "swap"),
        ("a 1990s car", "an 80s car", "swap"),
        ("100% cotton", "5% cotton", "swap"),
        ("a 35mm photo", "a photo", "refine"),
    ],
)
def test_auto(source: str, target: str, alignment: str) -> None:
    assert resolve(SD1.read(source), SD1.read(target), "auto") == alignment


def test_a_chosen_alignment_is_kept() -> None:
    one = SD1.read("a cat")
    assert [resolve(one, one, choice) for choice in ("swap", "refine")] == ["swap", "refine"]


# --- literal examples ------------------------------------------------------------------------------------------------


def test_published_code_misplaces_tokens_after_an_unequal_pair() -> None:
    """A word of 1 token swapped for one of 2 shifts all that follow; each later word must still map to itself."""
    source, target = SD1.read("a striped cat on a mat"), SD1.read("a checkered cat on a mat")
    swapped = carry_over(source, target, "swap").source
    assert source.tokens[1] == (2,)
    assert target.tokens[1] == (2, 3)
    assert swapped[2, 2:4].tolist() == [0.5, 0.5]
    for (i,), (j,) in zip(source.tokens[2:], target.tokens[2:], strict=True):
        assert swapped[i, j] == 1
        assert swapped[:, j].sum() == 1


def test_formula_written_out() -> None:
    """Two target tokens for one source token, in a text of 7: start, a, b c, end and padding; the last row folds."""
    one, other = words([pieces("x y", 7)]), words([pieces("x b|c", 7)])
    expected = torch.zeros(7, 7)
    expected[0, 0] = expected[1, 1] = 1
    expected[2, 2] = expected[2, 3] = 0.5
    expected[3, 4] = expected[4, 5] = expected[5, 6] = expected[6, 6] = 1
    assert torch.equal(carry_over(one, other, "swap").source, expected)
    back = torch.zeros(7, 7)
    back[0, 0] = back[1, 1] = back[2, 2] = back[3, 2] = 1
    back[4, 3] = back[5, 4] = 1
    back[6, 5] = back[6, 6] = 0.5
    assert torch.equal(carry_over(other, one, "swap").source, back)


def test_swap_with_blocks_written_out() -> None:
    """Of "x a b y" and "x c y d": two words become one, and one is added."""
    swapped = carry_over(words([pieces("x a b y", 7)]), words([pieces("x c|d|e y f", 8)]), "swap")
    expected = torch.zeros(7, 8)
    expected[0, 0] = expected[1, 1] = expected[4, 5] = 1
    expected[2:4, 2:5] = 1 / 3
    expected[5, 7] = expected[6, 7] = 1
    torch.testing.assert_close(swapped.source, expected)
    assert swapped.own.tolist() == [0, 0, 0, 0, 0, 0, 1, 0]


def test_refine_written_out() -> None:
    """Of "x a y" and "x b c y": a is gone, b c are new."""
    refined = carry_over(words([pieces("x a y", 7)]), words([pieces("x b|c y", 7)]), "refine")
    expected = torch.zeros(7, 7)
    expected[0, 0] = expected[1, 1] = expected[3, 4] = 1
    expected[4, 5] = expected[5, 6] = expected[6, 6] = 1
    assert torch.equal(refined.source, expected)
    assert refined.own.tolist() == [0, 0, 1, 1, 0, 0, 0]


def test_more_and_fewer_chunks_written_out() -> None:
    """One chunk of 5, "x", and two, "x y z" and "y": tails are 3, 1 and 3 long."""
    short, long = words([pieces("x", 5)]), words([pieces("x y z", 5), pieces("y", 5)])
    expected = torch.zeros(5, 10)
    expected[0, 0] = expected[0, 5] = 0.5
    expected[1, 1] = 1
    expected[2:, 4] = 0.5
    expected[2, 7] = expected[3, 8] = expected[4, 9] = 0.5
    refined = carry_over(short, long, "refine")
    assert torch.equal(refined.source, expected)
    assert refined.own.tolist() == [0, 0, 1, 1, 0, 0, 1, 0, 0, 0]
    back = torch.zeros(10, 5)
    back[0, 0] = back[5, 0] = back[1, 1] = 1
    back[4, 2:] = 1 / 3
    back[7:, 4] = 1
    torch.testing.assert_close(carry_over(long, short, "refine").source, back)


def test_equal_prompts_give_the_identity() -> None:
    for prompt in ("a cat on a mat", "cat " * 80):
        for alignment in ("swap", "refine"):
            carry = carried(prompt, prompt, alignment)
            assert torch.equal(carry.source, torch.eye(len(carry.own)))
            assert not carry.own.any()


# --- any two prompts -------------------------------------------------------------------------------------------------

vocabulary = st.sampled_from(VOCABULARY)
phrases = st.lists(vocabulary, max_size=12)
# Beyond one chunk and beyond two.
stuffing = st.sampled_from([[], [], [], ["a", "lasagne", ","] * 20, ["red", "chiaroscuro"] * 35])


@st.composite
def edits(draw: st.DrawFn, equal_blocks: bool = False, long: bool = True) -> tuple[str, str]:
    """A source prompt and the same with words replaced, inserted, deleted and swapped with their neighbours."""
    source = [*draw(phrases), *(draw(stuffing) if long else []), *draw(phrases)]
    target = list(source)
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["replace"] if equal_blocks else ["replace", "insert", "delete", "reorder"]))
        at = draw(st.integers(0, max(0, len(target) - 1)))
        match kind:
            case "replace":
                target[at : at + 1] = [draw(vocabulary)] if target else []
            case "insert":
                target[at:at] = draw(phrases)
            case "delete":
                del target[at : at + 3]
            case "reorder":
                target[at : at + 2] = target[at : at + 2][::-1]
    return " ".join(source), " ".join(target)


some = settings(max_examples=40, deadline=None)


@some
@given(edits(equal_blocks=True))
def test_swapping_word_for_word_loses_no_attention(prompts: tuple[str, str]) -> None:
    source, target = map(SD1.read, prompts)
    assume(resolve(source, target, "auto") == "swap")
    carry = carry_over(source, target, "swap")
    assert (carry.source >= 0).all()
    assert not carry.own.any()
    torch.testing.assert_close(carry.source.sum(1), torch.ones(source.length))
    for one, other, before, after in zip(source.tokens, target.tokens, source.texts, target.texts, strict=True):
        block = carry.source[list(one)][:, list(other)]
        torch.testing.assert_close(block.sum(1), torch.ones(len(one)))
        if before == after:
            assert torch.equal(block, torch.eye(len(one)))


@some
@given(edits(equal_blocks=True))
def test_swap_and_swap_back_is_the_identity_on_words(prompts: tuple[str, str]) -> None:
    source, target = map(SD1.read, prompts)
    assume(resolve(source, target, "auto") == "swap")
    back = carry_over(source, target, "swap").source @ carry_over(target, source, "swap").source
    for word in source.tokens:
        torch.testing.assert_close(back[list(word)][:, list(word)].sum(1), torch.ones(len(word)))


@some
@given(edits())
def test_swap_of_any_prompts_gives_each_target_word_an_origin(prompts: tuple[str, str]) -> None:
    source, target = map(SD1.read, prompts)
    carry = carry_over(source, target, "swap")
    torch.testing.assert_close(carry.source[outer(source)].sum(1), torch.ones(len(outer(source))))
    sums = carry.source[inner(source)].sum(1)
    assert (torch.isclose(sums, torch.ones(())) | (sums == 0)).all()
    assert torch.equal(carry.own == 0, carry.source.sum(0) > 0)


@some
@given(edits())
@example(("lasagne " * 80, ""))
@example(("", "lasagne " * 80))
def test_refine_gives_each_target_word_exactly_one_origin(prompts: tuple[str, str]) -> None:
    source, target = map(SD1.read, prompts)
    matrix, own = carry_over(source, target, "refine")
    pairs = align([source.pieces[i] for i in inner(source)], [target.pieces[j] for j in inner(target)])
    kept = {inner(source)[i]: inner(target)[j] for i, j in pairs}
    for i in inner(source):
        assert matrix[i].nonzero().flatten().tolist() == ([kept[i]] if i in kept else [])
    torch.testing.assert_close(matrix[outer(source)].sum(1), torch.ones(len(outer(source))))
    assert not matrix[outer(source)][:, inner(target)].any()
    assert ((matrix.sum(0) + own)[inner(target)] == 1).all()
    assert not own[outer(target)].any()
    assert (matrix.sum(0)[outer(target)] > 0).all()
    if prompts[0] == prompts[1]:
        assert torch.equal(matrix, torch.eye(source.length))


def published_scores(source: list[str], target: list[str]) -> list[list[int]]:
    """Needleman-Wunsch as in Prompt-to-Prompt's seq_aligner, gap 0, match 1, mismatch -1: of all beginnings."""
    scores = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for i in range(1, len(source) + 1):
        for j in range(1, len(target) + 1):
            diagonal = scores[i - 1][j - 1] + (1 if source[i - 1] == target[j - 1] else -1)
            scores[i][j] = max(scores[i][j - 1], scores[i - 1][j], diagonal)
    return scores


@some
@given(edits(long=False))
def test_refine_agrees_with_the_published_aligner(prompts: tuple[str, str]) -> None:
    """As many tokens are kept, all of them pairs of an optimum: where there is but one, it is the published mapping."""
    source, target = map(SD1.read, prompts)
    ones, others = ([prompt.pieces[i] for i in inner(prompt)] for prompt in (source, target))
    before, after = published_scores(ones, others), published_scores(ones[::-1], others[::-1])
    optimal = {
        (i, j)
        for i, one in enumerate(ones)
        for j, other in enumerate(others)
        if one == other and before[i][j] + 1 + after[len(ones) - 1 - i][len(others) - 1 - j] == before[-1][-1]
    }
    kept = carry_over(source, target, "refine").source[inner(source)][:, inner(target)].nonzero().tolist()
    assert len(kept) == before[-1][-1]
    assert {tuple(pair) for pair in kept} <= optimal
    assert sorted(j for _, j in kept) == [j for _, j in kept]


# --- several targets -------------------------------------------------------------------------------------------------


def edit_of(source: str, targets: list[str], width: int = 8, seed: int = 0) -> PromptEdit:
    """Joined from one edit for each target, of random embeddings; the source's depends on its text alone."""
    generator = torch.Generator().manual_seed(seed)
    one = SD1.read(source)
    embedding = torch.randn(1, one.length, width, generator=torch.Generator().manual_seed(len(source)))
    single = []
    for target in targets:
        other = SD1.read(target)
        vectors = torch.randn(1, other.length, width, generator=generator)
        pooled = torch.randn(1, 4, generator=generator)
        single.append(PromptEdit(one, (other,), (resolve(one, other, "auto"),), (embedding, vectors), pooled))
    return join(single)


TARGETS = ["a blue cat on a mat", "a red cat on a mat, watercolor", "a red dog" + " and a dog" * 30]


def test_targets_of_different_lengths_attend_as_each_alone() -> None:
    edit = edit_of("a red cat on a mat", TARGETS)
    assert edit.alignments == ("swap", "refine", "refine")
    assert edit.embeddings[1].shape == (3, 154, 8)
    source, targets = edit.embeddings[0].double(), edit.embeddings[1].double()
    generator = torch.Generator().manual_seed(1)
    query_s, query_t = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    map_s = (query_s @ source[0].T).softmax(-1)

    def attend(context: torch.Tensor, matrix: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        edited = map_s @ matrix.double() + (query_t @ context.T).softmax(-1) * own.double()
        return edited @ context

    carry = edit.carry()
    assert carry.source.shape == (3, 77, 154)
    assert carry.own.shape == (3, 154)
    for k, target in enumerate(edit.targets):
        alone = carry_over(edit.source, target, edit.alignments[k])
        expected = attend(targets[k, : target.length], *alone)
        torch.testing.assert_close(attend(targets[k], carry.source[k], carry.own[k]), expected, rtol=0, atol=1e-12)


def test_an_alignment_for_all_targets() -> None:
    edit = edit_of("a red cat on a mat", TARGETS)
    refined = edit.carry("refine")
    for k, target in enumerate(edit.targets):
        assert torch.equal(refined.source[k, :, : target.length], carry_over(edit.source, target, "refine").source)


@pytest.mark.parametrize(("old", "new"), [("cat", "dog"), ("red", "fluffy"), ("cat", "blue")])
def test_the_most_similar_of_what_lies_between_is_paired_too(old: str, new: str) -> None:
    """InfEdit's alignment: one pair in every gap that has tokens on both sides, by the cosine of their embeddings."""
    edit = edit_of("a red cat on a mat at night", ["a blue fluffy dog on the mat", "a red cat on a large mat at night"])
    source, target = edit.source, edit.targets[0]
    of_old, of_new = source.tokens[source.texts.index(old)][0], target.tokens[target.texts.index(new)][0]
    edit.embeddings[1][0, of_new] = 0.01 * edit.embeddings[0][0, of_old]  # its direction, not its length
    carry, refined = edit.carry(SIMILAR), edit.carry("refine")
    pairs = refined.source[0].clone()
    pairs[of_old, of_new] = 1
    pairs[source.tokens[4][0], target.tokens[5][0]] = 1  # "a" and "the", alone in their gap
    assert torch.equal(carry.source[0], pairs)
    own = refined.own[0].clone()
    own[[of_new, target.tokens[5][0]]] = 0
    assert torch.equal(carry.own[0], own)
    assert own[[token for token, text in enumerate(target.pieces) if text == "blue</w>"]].any() == (new != "blue")
    assert torch.equal(carry.source[1], refined.source[1])  # a word that is added alone has nothing to be paired with


def test_batch_prompt_edits_joins_in_order() -> None:
    parts = [edit_of("a red cat on a mat", [target], seed=k) for k, target in enumerate(TARGETS)]
    names = [f"prompt_edit_{k}" for k in (1, 2, 3)]
    conditioning, edit = BatchPromptEdits.execute(dict(zip(names, parts, strict=True))).result
    ((embeddings, options),) = conditioning
    assert torch.equal(embeddings, edit.embeddings[1])
    assert [target.texts for target in edit.targets] == [SD1.read(target).texts for target in TARGETS]
    for k, part in enumerate(parts):
        assert torch.equal(options["pooled_output"][k], part.pooled[0])
        copies = embeddings[k].split(part.targets[0].length)
        assert all(torch.equal(copy, part.embeddings[1][0]) for copy in copies)
    no_pooled = [part._replace(pooled=None) for part in parts]
    assert BatchPromptEdits.execute(dict(zip(names, no_pooled, strict=True))).result[1].pooled is None


# --- the picture -----------------------------------------------------------------------------------------------------


def test_the_picture_shows_every_token() -> None:
    source, target = SD1.read("a cat on a mat"), SD1.read("a fluffy cat on a red mat, watercolor")
    picture = alignment_picture.draw(source, target, carry_over(source, target, "refine"))
    assert picture.shape[::3] == (1, 3)
    assert picture.dtype == torch.float32
    colours = {tuple(pixel) for pixel in (picture[0].flatten(0, 1) * 255).round().int().tolist()}
    assert {alignment_picture.CARRIED, alignment_picture.OWN} < colours


def test_the_picture_of_long_prompts_is_not_larger() -> None:
    long = SD1.read("cat " * 400)
    height, width = alignment_picture.draw(long, long, carry_over(long, long, "swap")).shape[1:3]
    assert max(height, width) < 2200


# --- errors ----------------------------------------------------------------------------------------------------------


def test_encoders_that_divide_a_prompt_differently_are_refused(embedding_folder: str) -> None:
    clip = Clip(comfy.sdxl_clip.SDXLTokenizer(embedding_directory=embedding_folder))
    with pytest.raises(ValueError, match="text encoders of this CLIP divide the source prompt into tokens differently"):
        clip.read("a embedding:uneven cat")
    long = {"clip_l_max_length": 248}
    clip = Clip(comfy.sdxl_clip.SDXLTokenizer(tokenizer_data=long))
    with pytest.raises(ValueError, match="in Prompt Edit use encoders of one length"):
        clip.read("cat " * 80)


def test_edits_of_different_sources_are_not_joined() -> None:
    edits = {"prompt_edit_1": edit_of("a red cat", ["a dog"]), "prompt_edit_2": edit_of("the cat", ["a dog"])}
    with pytest.raises(ValueError, match=r"that of prompt_edit_2 \(the cat\) is not the first one's \(a red cat\)"):
        BatchPromptEdits.execute(edits)
