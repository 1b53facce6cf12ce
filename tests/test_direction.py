"""Edit directions: the difference of means, what is done with it, and its file."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.sdxl_clip import SDXLClipModel, SDXLTokenizer
from comfy.supported_models_base import ClipTarget
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from palimpsest.guidance.direction import EditDirection, Embedded, apply, combine, direction_between
from palimpsest.guidance.sentences import TEMPLATES, templated, with_article
from palimpsest.nodes.direction import (
    ApplyEditDirection,
    CombineEditDirections,
    EditDirectionFromPrompts,
    LoadEditDirection,
    SaveEditDirection,
)
from tiny import execute

CAT = "a photo of a red cat in a room"


def embedded(seed: int, tokens: int = 77, pooled: int | None = 20) -> Embedded:
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(1, tokens, 12, generator=generator)
    return Embedded(embedding, None if pooled is None else torch.randn(1, pooled, generator=generator))


def encoded(clip, text: str) -> Tensor:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path


def test_a_direction_is_the_difference_of_means() -> None:
    source, target = [embedded(i) for i in range(3)], [embedded(i) for i in range(3, 8)]
    direction = direction_between(source, target)
    for name in ("embedding", "pooled"):
        expected = 0
        for sentence in target:
            expected = expected + getattr(sentence, name).double() / 5
        for sentence in source:
            expected = expected - getattr(sentence, name).double() / 3
        torch.testing.assert_close(getattr(direction, name).double(), expected, rtol=1e-5, atol=1e-6)
    moved = apply([[source[0].embedding, {"pooled_output": source[0].pooled, "width": 512}]], direction, 0.7)
    ((embedding, options),) = moved
    torch.testing.assert_close(embedding, source[0].embedding + 0.7 * direction.embedding)
    torch.testing.assert_close(options["pooled_output"], source[0].pooled + 0.7 * direction.pooled)
    assert options["width"] == 512


def test_there_and_back_is_nowhere() -> None:
    source, target = [embedded(0), embedded(1)], [embedded(2)]
    there, back = direction_between(source, target), direction_between(target, source)
    both = combine([(there, 1.0), (back, 1.0)])
    assert not both.embedding.any()
    assert not both.pooled.any()
    assert there.embedding.any()


def test_combining_is_linear() -> None:
    one, other = direction_between([embedded(0)], [embedded(1)]), direction_between([embedded(2)], [embedded(3)])
    (both,) = execute(CombineEditDirections, direction_a=one, weight_a=0.5, direction_b=other, weight_b=-2.0)
    for ours, a, b in zip(both, one, other, strict=True):
        torch.testing.assert_close(ours, 0.5 * a - 2 * b)
    (scaled,) = CombineEditDirections.execute(one, -1.5).result
    torch.testing.assert_close(scaled.embedding, -1.5 * one.embedding)
    entry = [[embedded(4).embedding, {}]]
    twice = apply(apply(entry, one, 0.5), other, -2.0)
    torch.testing.assert_close(apply(entry, both, 1.0)[0][0], twice[0][0])


def test_strength_0_gives_the_prompt_bit_for_bit() -> None:
    conditioning = [[embedded(0).embedding, {"pooled_output": embedded(0).pooled}]]
    before = conditioning[0][0].clone()
    long = direction_between([embedded(1)], [embedded(2, tokens=154)])
    (same,) = ApplyEditDirection.execute(conditioning, long, 0.0).result
    assert torch.equal(same[0][0], before)
    (moved,) = execute(ApplyEditDirection, conditioning=conditioning, edit_direction=long)
    assert moved[0][0].shape == (1, 154, 12)
    assert torch.equal(conditioning[0][0], before)  # the host shares it between nodes


def test_lengths_are_made_equal_by_repeating() -> None:
    """Attention over a prompt and over the prompt twice is the same."""
    short, long = embedded(0), embedded(1, tokens=154)
    direction = direction_between([short], [long])
    torch.testing.assert_close(direction.embedding, long.embedding - torch.cat([short.embedding] * 2, 1))
    moved = apply([[short.embedding, {}]], direction, 1.0)[0][0]
    torch.testing.assert_close(moved, long.embedding, rtol=1e-5, atol=1e-5)
    plain = direction_between([embedded(2)], [embedded(3)])
    twice = apply([[long.embedding, {}]], plain, 1.0)[0][0]
    torch.testing.assert_close(twice[:, 77:], long.embedding[:, 77:] + plain.embedding)


def test_every_prompt_of_a_conditioning_moves() -> None:
    batch, other = torch.randn(3, 77, 12), torch.randn(1, 77, 12)
    direction = direction_between([embedded(0)], [embedded(1)])
    moved = apply([[batch, {}], [other, {"pooled_output": None}]], direction, 1.0)
    torch.testing.assert_close(moved[0][0], batch + direction.embedding)
    torch.testing.assert_close(moved[1][0], other + direction.embedding)
    assert moved[1][1]["pooled_output"] is None


def test_other_text_encoders_are_refused_in_a_sentence() -> None:
    direction = direction_between([embedded(0)], [embedded(1)])
    with pytest.raises(ValueError, match="The edit direction has 12 channels but the prompt has 16: make both with"):
        apply([[torch.zeros(1, 77, 16), {}]], direction, 1.0)
    with pytest.raises(ValueError, match="has 20 pooled channels but the prompt has 24"):
        apply([[torch.zeros(1, 77, 12), {"pooled_output": torch.zeros(1, 24)}]], direction, 1.0)
    other = direction_between([embedded(0, pooled=None)], [embedded(1, pooled=None)])
    with pytest.raises(ValueError, match=r"12 and 12 channels \(pooled: 20 and 0\): make both with the same CLIP"):
        combine([(direction, 1.0), (other, 1.0)])


def test_typed_lines_and_files_are_one_list(demo: tuple, folders: Path) -> None:
    _, clip, _ = demo
    (folders / "input" / "dogs.txt").write_text("\ufeffa photo of a red dog in a room\n\n", encoding="utf-8")
    (file,) = [i for i in EditDirectionFromPrompts.define_schema().inputs if i.id == "target_file"]
    assert file.options == ["none", "dogs.txt"]
    (direction,) = execute(
        EditDirectionFromPrompts,
        clip=clip,
        source=f"  {CAT}\n\n",
        target="a photo of a red sheep in a room",
        target_file="dogs.txt",
    )
    targets = [encoded(clip, f"a photo of a red {name} in a room") for name in ("sheep", "dog")]
    expected = (targets[0].double() + targets[1].double()) / 2 - encoded(clip, CAT).double()
    torch.testing.assert_close(direction.embedding.double(), expected, rtol=1e-4, atol=1e-5)
    moved = apply([[encoded(clip, CAT), {}]], direction, 1.0)[0][0]
    torch.testing.assert_close(moved, sum(targets) / 2, rtol=1e-4, atol=1e-5)


def test_a_direction_of_words_edits_a_prompt_that_it_was_not_made_from(demo: tuple) -> None:
    """A direction by demo captions takes a prompt towards its edited form, and one to another colour less so."""
    _, clip, _ = demo
    texts = [f"a photo of a {color} boat on a beach at sunset" for color in ("red", "green")]
    source, target = (encoded(clip, text) for text in texts)
    left = {"none": (source - target).norm()}
    for color in ("green", "blue", "yellow"):
        words = {"source": "red", "target": color, "sentences": "demo captions"}
        (direction,) = execute(EditDirectionFromPrompts, clip=clip, **words)
        left[color] = (apply([[source, {}]], direction, 1.0)[0][0] - target).norm()
    assert min(left, key=left.get) == "green"


def test_sdxl_directions_have_both_encoders_and_the_pooled_part(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    small |= {"hidden_act": "gelu", "max_position_embeddings": 77, "eos_token_id": 49407, "projection_dim": 16}
    options = {"clip_l_model_config": small, "clip_g_model_config": small, "dtype": torch.float32}
    clip = comfy.sd.CLIP(ClipTarget(SDXLTokenizer, SDXLClipModel), model_options=options)
    generator = torch.Generator().manual_seed(0)
    for parameter in clip.cond_stage_model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    (direction,) = execute(EditDirectionFromPrompts, clip=clip, source="cat", target="dog", sentences="templates")
    pairs = [clip.encode_from_tokens_scheduled(clip.tokenize(f"a photo of a {word}"))[0] for word in ("cat", "dog")]
    assert direction.embedding.shape == pairs[0][0].shape == (1, 77, 32)
    assert direction.pooled.shape == pairs[0][1]["pooled_output"].shape
    ((_, options),) = apply([pairs[0]], direction, 1.0)
    torch.testing.assert_close(options["pooled_output"], pairs[0][1]["pooled_output"] + direction.pooled)
    assert direction.pooled.any()


def test_files_keep_directions_and_nothing_else_passes(folders: Path) -> None:
    for direction in (
        direction_between([embedded(0)], [embedded(1)]),
        direction_between([embedded(0, pooled=None)], [embedded(1, pooled=None)]),
    ):
        SaveEditDirection.execute(direction, "kept/edit")
        name = max((folders / "output" / "kept").iterdir()).name
        (loaded,) = LoadEditDirection.execute(f"kept/{name} [output]").result
        assert torch.equal(loaded.embedding, direction.embedding)
        assert loaded.pooled is direction.pooled or torch.equal(loaded.pooled, direction.pooled)

    path = folders / "x.safetensors"
    direction_between([embedded(0)], [embedded(1)]).save(path)
    whole, tensors = path.read_bytes(), {k: v.clone() for k, v in load_file(path).items()}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    path.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=r"'x.safetensors' is not a readable safetensors file"):
        EditDirection.load(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="is no edit direction: choose a file written by Save Edit Direction"):
        EditDirection.load(path)
    save_file({"pooled": tensors["pooled"]}, path, metadata)
    with pytest.raises(ValueError, match="damaged edit direction: 'embedding' is missing"):
        EditDirection.load(path)
    save_file(tensors | {"embedding": tensors["embedding"][0]}, path, metadata)
    with pytest.raises(ValueError, match=r"damaged edit direction: its tensors have shapes \[\[77, 12\], \[1, 20\]\]"):
        EditDirection.load(path)
    save_file(tensors | {"pooled": tensors["pooled"] * torch.nan}, path, metadata)
    with pytest.raises(ValueError, match="damaged edit direction: it holds NaN or infinite values"):
        EditDirection.load(path)


def test_bad_input_is_refused_in_a_sentence(demo: tuple, folders: Path) -> None:
    _, clip, _ = demo
    with pytest.raises(ValueError, match="The target list of Edit Direction from Prompts is empty: type a word"):
        execute(EditDirectionFromPrompts, clip=clip, target=" \n ")
    with pytest.raises(ValueError, match="got no CLIP"):
        execute(EditDirectionFromPrompts, clip=None)
    with pytest.raises(ValueError, match="has 'cow' where it needs one of: photo of"):
        execute(EditDirectionFromPrompts, clip=clip, source="cow", sentences="demo captions")
    (folders / "input" / "picture.txt").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"cannot read 'picture.txt': save it as UTF-8 text"):
        execute(EditDirectionFromPrompts, clip=clip, source_file="picture.txt")
    with pytest.raises(ValueError, match=r"finds no file 'gone.txt'"):
        execute(EditDirectionFromPrompts, clip=clip, target_file="gone.txt")
    with pytest.raises(ValueError, match=r"may not read '../secret.txt'"):
        execute(EditDirectionFromPrompts, clip=clip, source_file="../secret.txt")


def test_a_text_file_written_anew_is_read_anew(folders: Path) -> None:
    fingerprint = EditDirectionFromPrompts.fingerprint_inputs
    path = folders / "input" / "words.txt"
    path.write_text("cat")
    before = fingerprint(source_file="words.txt", target_file="none", sentences="templates")
    assert before == fingerprint(source_file="words.txt", target_file="none", sentences="templates")
    path.write_text("cats")
    assert fingerprint(source_file="words.txt", target_file="none", sentences="templates") != before


def test_long_lists_can_be_interrupted(demo: tuple) -> None:
    _, clip, _ = demo
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        execute(EditDirectionFromPrompts, clip=clip)
    execute(EditDirectionFromPrompts, clip=clip)


def test_articles() -> None:
    said = "a cat, an owl, a unicorn, an uninteresting book, an hour, a horse, a European city, a user, an umbrella, "
    said += (
        "an X-ray, a one-way street, a hot dog, an Orange, an honest man, a theatre, an ancient ruin, an unusual hat"
    )
    for phrase in said.split(", "):
        assert with_article(phrase.split(" ", 1)[1]) == phrase
    for phrase in ("the sea", "An apple", "two dogs", "3 dogs", "some snow", "my house", "one"):
        assert with_article(phrase) == phrase


def test_templates_are_some_dozens_that_differ() -> None:
    sentences = templated("owl")
    assert len(set(sentences)) == len(TEMPLATES) >= 36
    assert all("an owl" in sentence for sentence in sentences)
