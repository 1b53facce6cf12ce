"""The reader that takes the words of a demo scene back out of its picture."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from palimpsest.demo import edits, scenes, score
from palimpsest.demo.places import view

WORD = {"object": "thing", "add": "extra", "delete": "extra", "content": "extra", "colour": "look", "material": "look"}


def noisy(image: np.ndarray) -> np.ndarray:
    return image + np.random.default_rng(0).normal(0, 0.03, image.shape)


def blurred(image: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(image, (0.6, 0.6, 0))


def wrong(verdict: dict[str, bool]) -> set[str]:
    return {word for word, right in verdict.items() if not right}


@pytest.mark.parametrize("spoil", [np.array, noisy, blurred], ids=["clean", "noisy", "blurred"])
@pytest.mark.parametrize(
    "caption",
    [
        "a photo of a cat on a meadow",
        "a photo of a large golden castle with a flag in a desert at sunset",
        "a pencil drawing of a small sleeping blue dog with a ball facing right in a room",
        "a watercolor of a purple cup of coffee in a forest",
        "a photo of a red car facing right next to a stone snowman with a hat in the snow at night",
        "a pencil drawing of a rabbit in front of a wooden house with lit windows on a street",
    ],
)
def test_reader_finds_the_scene(caption: str, spoil: Callable[[np.ndarray], np.ndarray]) -> None:
    scene = scenes.parse(caption, 4)
    assert wrong(score.judge(spoil(scenes.render(scene)), scene)) == set()


@pytest.mark.slow
@pytest.mark.parametrize("pair", [False, True], ids=["one", "two"])
def test_reader_errs_in_at_most_one_picture(pair: bool) -> None:
    rng = random.Random(f"reader {pair}")
    drawn = [scenes.sample(rng, pair) for _ in range(25)]
    missed = [scene.caption for scene in drawn if not score.judge(scenes.render(scene), scene)["all"]]
    assert len(missed) <= 1, missed


def test_reader_finds_the_layout() -> None:
    scene = scenes.parse("a photo of a cat next to a house on a beach", 5)
    found = score.read(scenes.render(scene)).scene
    np.testing.assert_allclose(found.spots(), scene.spots(), atol=2)
    assert found.shift == scene.shift


@pytest.mark.parametrize("kind", ["object", "add", "delete", "content", "colour", "material", "style"])
def test_reader_rejects_just_the_word_that_is_off(kind: str) -> None:
    edit = edits.draw(random.Random(f"off {kind}"), kind, pair=False)
    assert wrong(score.judge(scenes.render(edit.target), edit.source)) == {WORD.get(kind, kind), "all"}, edit


@pytest.mark.parametrize(
    ("word", "other"),
    [
        ("size", "a photo of a large cat on a meadow"),
        ("pose", "a photo of a sitting cat on a meadow"),
        ("facing", "a photo of a cat facing right on a meadow"),
        ("place", "a photo of a cat on a beach"),
        ("time", "a photo of a cat on a meadow at night"),
    ],
)
def test_reader_tells_words_apart(word: str, other: str) -> None:
    scene = scenes.parse("a photo of a cat on a meadow", 2)
    assert wrong(score.judge(scenes.render(scenes.parse(other, 2)), scene)) == {word, "all"}


def test_reader_minds_how_things_lie() -> None:
    scene = scenes.parse("a photo of a red cat next to a blue house on a meadow", 1)
    before = score.judge(scenes.render(replace(scene, relation="in front of")), scene)
    assert wrong(before) == {"relation", "all"}
    swapped = score.judge(scenes.render(replace(scene, things=scene.things[::-1])), scene)
    assert wrong(swapped) == {"thing", "look", "all"}


def test_reader_counts() -> None:
    one = scenes.parse("a photo of a cat on a meadow", 1)
    two = scenes.parse("a photo of a cat next to a dog on a meadow", 1)
    for drawn, asked in ((one, two), (two, one)):
        assert {"count", "relation"} <= wrong(score.judge(scenes.render(drawn), asked))


@pytest.mark.slow
def test_reader_sees_what_is_there_besides() -> None:
    two = scenes.parse("a photo of a cat next to a dog on a meadow", 1)
    crowded = scenes.render(two)
    crowded[40:72, 48:80] = (0.9, 0.1, 0.1)
    assert "count" in wrong(score.judge(crowded, two))


@pytest.mark.slow
def test_reader_survives_nonsense() -> None:
    image = ndimage.gaussian_filter(np.random.default_rng(0).normal(0.5, 2, (128, 128, 3)), (2, 2, 0)).clip(0, 1)
    assert score.read(image).rest > 0.1


@pytest.mark.slow
def test_reader_finds_nothing_in_an_empty_place() -> None:
    assert "count" in wrong(score.judge(view("beach", "", 3), scenes.parse("a photo of a small cake on a beach", 3)))
