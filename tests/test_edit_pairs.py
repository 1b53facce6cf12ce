"""Make Edit Pairs: what is drawn, made, left out and written, and how a run goes on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import comfy.model_management
import folder_paths
import numpy as np
import pytest
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.sample import prepare_noise, sample
from PIL import Image

from palimpsest.attention.edit_pairs import Drawn, Likeness, Ranges, pair
from palimpsest.attention.editing import prompt_to_prompt, rewrite
from palimpsest.demo import model as demo_model
from palimpsest.host.files.pairs import Pairs
from palimpsest.nodes.edit_pairs import MakeEditPairs
from tiny import execute, randomise, rows_of

CAPTIONS = (
    "a photo of a cat on a meadow | a photo of a dog on a meadow | make the cat a dog\n"
    "\n"
    "a photo of a house on a meadow | a photo of a house on a meadow at night | make it at night\n"
)
EMPTY = {"samples": torch.zeros(2, 16, 16, 16)}


@pytest.fixture(scope="module")
def demo() -> tuple:
    return demo_model.load(few_steps=True)


@pytest.fixture(autouse=True)
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def made(demo: tuple, **changes: object) -> tuple:
    model, clip, vae = demo
    inputs = {"model": model, "clip": clip, "vae": vae, "latent": EMPTY, "captions": CAPTIONS, "samples": 3, "steps": 2}
    return execute(MakeEditPairs, **inputs | {"cfg_from": 1.0, "cfg_to": 2.0} | changes)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_what_is_drawn() -> None:
    """Evenly from the paper's ranges, the same by the same seed."""
    ranges = Ranges()
    found = [Drawn.by(random.Random(f"0 {i}"), ranges) for i in range(2000)]
    assert found[:9] == [Drawn.by(random.Random(f"0 {i}"), ranges) for i in range(9)]
    shares, cfgs, seeds = zip(*found, strict=True)
    assert (min(shares), max(shares), np.mean(shares)) == pytest.approx((0.1, 0.9, 0.5), abs=0.02)
    assert (min(cfgs), max(cfgs), np.mean(cfgs)) == pytest.approx((7.5, 15, 11.25), abs=0.2)
    assert len(set(seeds)) == 2000


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_pair_is_two_runs_of_the_hosts_sampler(demo: tuple, share: float) -> None:
    """From one noise, bit for bit where nothing is shared."""
    model, clip, _ = demo
    source, target, edit = rewrite(clip, "a photo of a cat on a meadow", "a photo of a dog on a meadow")
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    drawn, empty = Drawn(share, 2.0, 5), EMPTY["samples"]
    before, after = pair(
        model, source, target, negative, drawn, empty, 4, lambda t: prompt_to_prompt(model, t, edit, drawn.settings)
    )
    noise = prepare_noise(empty, 5)
    plain = [sample(model, noise, 4, 2.0, "euler", "simple", prompt, negative, empty) for prompt in (source, target)]
    assert torch.equal(before, plain[0])
    difference = (after - plain[1]).abs().max()
    assert difference == 0 if share == 0 else difference > 0.1
    nearer = [(one - before).square().mean() for one in (after, plain[1])]
    assert nearer[0] < 0.9 * nearer[1] or share == 0


def test_likeness() -> None:
    """Cosines, written out in float64."""
    before, after, caption, edited = torch.randn(4, 3, 8, dtype=torch.float64).unbind()

    def cosine(a, b):
        return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))

    def unit(a):
        return a / a.norm(dim=-1, keepdim=True)

    found = Likeness.of(before, after, caption, edited)
    expected = [cosine(before, after), torch.minimum(cosine(before, caption), cosine(after, edited))]
    expected = [value.clamp_min(0) for value in expected]
    expected.append(cosine(unit(after) - unit(before), unit(edited) - unit(caption)))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-12


def test_the_filter_keeps_what_is_like_enough_in_all_three() -> None:
    found = Likeness(*torch.tensor([[0.7, 0.69, 0.9, 0.9], [0.2, 0.3, 0.19, 0.3], [0.2, 0.3, 0.3, 0.19]]))
    assert found.passes(Likeness(*torch.tensor([0.7, 0.2, 0.2]))).tolist() == [True, False, False, False]


def test_the_folder(demo: tuple, output: Path) -> None:
    """As imagefolder reads it: keys that end in _file_name, with paths beside metadata.jsonl."""
    before, after, said = made(demo)
    assert before.shape == after.shape == (8, 128, 128, 3)  # three of each line, two at once
    assert said.splitlines() == ["make the cat a dog"] * 4 + ["make it at night"] * 4
    folder = output / "edit-pairs"
    lines = lines_of(folder)
    assert len(lines) == 8
    assert len(list(folder.glob("*.png"))) == 16
    for i, line in enumerate(lines):
        for side, pictures in (("input", before), ("edited", after)):
            with Image.open(folder / line[f"{side}_file_name"]) as picture:
                assert np.array_equal(np.asarray(picture), (pictures[i] * 255).round().byte().numpy())
        assert 0.1 <= line["p2p"] <= 0.9
        assert 1 <= line["cfg"] <= 2
    assert len({line["seed"] for line in lines}) == 4
    assert (before - after).abs().amax((1, 2, 3)).min() > 0.05
    assert lines[0]["caption"] == "a photo of a cat on a meadow"
    assert lines[-1]["edited_caption"] == "a photo of a house on a meadow at night"


def test_a_run_goes_on_where_it_was_stopped(demo: tuple, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends as one that was not; a finished one runs nothing; others add to the folder."""
    expected = made(demo, folder="whole")
    metadata = output / "edit-pairs" / "metadata.jsonl"

    def halfway() -> None:
        if metadata.exists() and len(lines_of(metadata.parent)) == 4:
            raise comfy.model_management.InterruptProcessingException

    model, rows = rows_of(demo[0])
    with monkeypatch.context() as context:
        context.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", halfway)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            made((model, *demo[1:]))
    half = len(rows)
    assert len(lines_of(output / "edit-pairs")) == 4
    result = made((model, *demo[1:]))
    assert len(rows) == 2 * half
    assert all(torch.equal(ours, whole) for ours, whole in zip(result[:2], expected[:2], strict=True))
    again = made((model, *demo[1:]))
    assert len(rows) == 2 * half
    assert torch.equal(again[1], result[1])
    other = made(demo, seed=1, samples=1)
    assert len(lines_of(output / "edit-pairs")) == 12
    assert len(other[0]) == 4
    assert not torch.equal(other[0][:2], result[0][:2])


def test_the_node_leaves_out_what_a_clip_finds_unlike(demo: tuple, output: Path) -> None:
    """And says of each pair that it keeps how alike it is."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    sizes |= {"image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu", "num_channels": 3}
    vision = ClipVisionModel(sizes | {"model_type": "clip_vision_model", "projection_dim": 128})
    randomise(vision.model, 7)
    both = {"filter_clip": demo[1], "clip_vision": vision, "least_text": -1.0}
    made(demo, **both, least_image=-1.0, least_direction=-1.0, folder="all")
    found = sorted(line["direction"] for line in lines_of(output / "all"))
    assert len(found) == 8
    middle = sum(found[3:5]) / 2
    made(demo, **both, least_image=-1.0, least_direction=middle, folder="some")
    kept = lines_of(output / "some")
    assert sorted(line["direction"] for line in kept) == found[4:]
    assert len(list((output / "some").glob("*.png"))) == 8
    with pytest.raises(ValueError, match="tried 8 pairs and its CLIP left all of them out: lower least_image"):
        made(demo, **both, least_image=-1.0, least_direction=1.0, folder="none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": " \n"}, "There is nothing in the captions of Make Edit Pairs: write lines of"),
        (
            {"captions": "a cat | a dog"},
            r"Line 1 of the captions of Make Edit Pairs is 'a cat . a dog': .* with '\|'",
        ),
        ({"captions": "\na cat | a | dog | x"}, "Line 2 of the captions of Make Edit Pairs is"),
        ({"cfg_from": 3.0}, "has cfg_from at 3 but cfg_to at 2: raise cfg_to"),
        ({"shared_to": 0.05}, "has shared_from at 0.1 but shared_to at 0.05: raise shared_to"),
        ({"folder": "../elsewhere"}, "Make Edit Pairs may not write to '../elsewhere': choose a folder in the output"),
        ({"latent": {"samples": torch.ones(1, 4, 16, 16)}}, "but the MODEL takes 16 channels"),
        ({"filter_clip": "a clip"}, "filters by both halves of a CLIP, but clip_vision is not connected"),
    ],
)
def test_refusals(demo: tuple, output: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(demo, **changes)
    assert list(output.iterdir()) == []


def test_a_file_in_the_way_is_said(demo: tuple, output: Path) -> None:
    (output / "edit-pairs").write_text("")
    with pytest.raises(ValueError, match="Make Edit Pairs cannot make the folder 'edit-pairs'"):
        made(demo)


def test_pairs_of_other_runs_are_left_alone(tmp_path: Path) -> None:
    one, other = Pairs(tmp_path, "one"), Pairs(tmp_path, "other")
    picture = torch.zeros(4, 4, 3)
    one.finish(0, [one.draw(0, 0, (picture, picture + 1))])
    other.finish(0, [])
    other.finish(1, [other.draw(1, 0, (picture, picture))])
    assert (one.done, other.done) == (1, 2)
    assert len(one.lines) == len(other.lines) == 1
    before, after = Pairs(tmp_path, "one").pictures(one.lines)
    assert torch.equal(before, torch.zeros(1, 4, 4, 3))
    assert torch.equal(after, torch.ones(1, 4, 4, 3))
