"""Pairs of pictures with an instruction: what is said of an edit, and the folder that `dev.py pairs` writes."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy.sd1_clip import SDTokenizer
from PIL import Image
from torch import Tensor

from palimpsest.attention.edit_pairs import Asked, Likeness
from palimpsest.benchmarks import pairs
from palimpsest.demo import edits, scenes
from palimpsest.demo.edits import Edit
from palimpsest.demo.instructions import instructions, said, words

SAID = [
    ("a photo of a cat on a meadow", "a photo of a dog on a meadow", "make the cat a dog"),
    ("a photo of a car on a street", "a photo of a red car on a street", "make the car red"),
    ("a photo of a red car on a street", "a photo of a car on a street", "give the car its natural colour"),
    ("a photo of a dog on a beach", "a photo of a dog with a hat on a beach", "give the dog a hat"),
    ("a photo of a dog with a hat on a beach", "a photo of a dog on a beach", "remove the hat"),
    ("a photo of a cup in a room", "a photo of a cup of milk in a room", "fill the cup with milk"),
    ("a photo of a sitting cat in a room", "a photo of a cat in a room", "make the cat stand up"),
    ("a photo of a cat facing right in a room", "a photo of a cat in a room", "turn the cat to the left"),
    ("a photo of a house on a meadow", "a photo of a house in the snow", "put it in the snow"),
    ("a photo of a house on a meadow", "a photo of a house on a meadow at night", "make it at night"),
    ("a photo of a house on a meadow at night", "a photo of a house on a meadow", "make it day"),
    ("a photo of a house on a meadow", "a pencil drawing of a house on a meadow", "make it a pencil drawing"),
]


@pytest.mark.parametrize(("caption", "edited", "instruction"), SAID)
def test_an_edit_is_said_in_words(caption: str, edited: str, instruction: str) -> None:
    assert instructions(Edit("", scenes.parse(caption, 0), scenes.parse(edited, 0)))[0] == instruction


def test_nothing_is_said_where_it_could_be_either_of_two_things() -> None:
    before, after = (f"a photo of a cat next to a {look}cat in a room" for look in ("", "red "))
    assert instructions(Edit("", scenes.parse(before, 0), scenes.parse(after, 0))) == []


def test_several_changes_are_said_one_after_the_other() -> None:
    before, after = "a photo of a cat in a room", "a photo of a dog in the snow"
    assert (
        said(Edit("", scenes.parse(before, 0), scenes.parse(after, 0))) == "put it in the snow and make the cat a dog"
    )


def test_every_word_is_a_caption_s_or_one_token_of_the_new_ones() -> None:
    tokenizer, known = SDTokenizer(embedding_size=8).tokenizer, {*words(), *scenes.WORDS}
    assert all(len(tokenizer(word)["input_ids"]) == 3 for word in words())
    rng = random.Random(0)
    for kind in pairs.KINDS * 40:
        for instruction in instructions(edits.draw(rng, kind)):
            assert set(instruction.split()) <= known


@pytest.fixture
def arguments(tmp_path: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    pairs.add_arguments(parser)
    own = ["--output", str(tmp_path / "pairs"), "--pairs", "2", "--batch", "2", "--samples", "1", "--steps", "2"]
    return parser.parse_args(own)


def test_the_folder_is_one_that_imagefolder_reads(arguments: argparse.Namespace) -> None:
    """Its rule for several pictures a line: keys that end in _file_name, with paths beside metadata.jsonl."""
    pairs.run(arguments)
    lines = [json.loads(line) for line in (arguments.output / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["instruction"] in [
            told
            for first in (scenes.parse(line["caption"], 0),)
            for told in instructions(Edit("", first, scenes.parse(line["edited_caption"], 0)))
        ]
        sides = [Image.open(arguments.output / line[f"{side}_file_name"]) for side in ("input", "edited")]
        assert [side.size for side in sides] == [(128, 128)] * 2
        assert np.abs(np.subtract(*(np.asarray(side, float) for side in sides))).max() > 10
        assert 0.1 <= line["p2p"] <= 0.9
        assert 1 <= line["cfg"] <= 2
    assert pairs.folder(arguments).done == 1  # where a further run begins


def test_what_the_filter_leaves_out_is_not_written(
    arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(before: Tensor, after: Tensor, asked: list[Asked]) -> Likeness:
        return Likeness(*torch.tensor([[0.0, 1.0]] * 3))

    monkeypatch.setattr(pairs, "judge", lambda *_: second)
    arguments.asked = pairs.asked_in_turn(arguments)
    (line,) = pairs.make_batch(arguments, 0)
    names = {line["input_file_name"], line["edited_file_name"]}
    assert {name.split("-", 1)[1] for name in names} == {"00000-01-input.png", "00000-01-edited.png"}
    assert {path.name for path in arguments.output.iterdir()} == names
    assert line["direction"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "There is nothing in .*captions.txt: write lines of caption"),
        ("a photo of a cat on a meadow\tmake it a dog", "Line 1 of .*captions.txt is 'a photo .* with tabs between"),
        ("\na photo of a cat\ta photo of a dog\tx", "has 'a photo of a cat': The Demo Scene caption has its end where"),
        ("a photo of a cat in a room\ta photo of a wolf in a room\tmake it a wolf", "caption has 'wolf'"),
    ],
)
def test_captions_that_are_none_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (path := tmp_path / "captions.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        pairs.read_captions(path, check=True)


def test_other_models_take_any_words(tmp_path: Path) -> None:
    (path := tmp_path / "captions.txt").write_text("a wolf\ta bear\tmake it a bear\n")
    assert pairs.read_captions(path, check=False) == [Asked("a wolf", "a bear", "make it a bear")]
