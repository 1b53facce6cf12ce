"""The demo world: its language, its pictures and the edits with one true answer."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.demo import edits, scenes
from palimpsest.demo.captions import demo_captions
from palimpsest.demo.drawing import COLORS

SEEDS = st.integers(0, 2**32 - 1)
SCENES = st.builds(lambda seed, pair: scenes.sample(random.Random(seed), pair), SEEDS, st.booleans())

some_examples = settings(max_examples=25, deadline=None)

# What the shipped weights know: pictures must not change without a new training.
TRAINED_ON = [-0.31, -0.584, 0.432, 0.506, 0.384, 0.802, 0.278, 0.021, 0.525, 0.329, 0.122, 0.557]

CAT = "a photo of a cat on a meadow"


def layout(scene: scenes.Scene) -> list[tuple[float, float, float]]:
    return [(thing.x, thing.y, thing.r) for thing in scene.things]


def drawn(caption: str, seed: int = 3) -> np.ndarray:
    return scenes.render(scenes.parse(caption, seed))


# --- captions --------------------------------------------------------------------------------------------------------


@given(SCENES, SEEDS)
def test_caption_round_trip(scene: scenes.Scene, seed: int) -> None:
    assert len(scene.caption.split()) <= scenes.MOST_WORDS
    assert set(scene.caption.split()) <= set(scenes.WORDS)
    parsed = scenes.parse(scene.caption, seed)
    assert parsed.caption == scene.caption
    placed = [replace(thing, x=own.x, y=own.y, r=own.r) for thing, own in zip(parsed.things, scene.things, strict=True)]
    assert replace(parsed, things=tuple(placed), shift=scene.shift) == scene


def test_captions_may_have_capitals_and_commas() -> None:
    loose = scenes.parse("A photo of a red CAT, next to a large golden house, in the snow, at night", 3)
    assert loose == scenes.parse("a photo of a red cat next to a large golden house in the snow at night", 3)


@pytest.mark.parametrize(
    ("caption", "named", "needed"),
    [
        ("", "its end", "a photo of"),
        ("the photo of a cat on a meadow", "'the'", "a photo of"),
        ("a picture of a cat on a meadow", "'picture' after 'a'", "a watercolor of"),
        ("a photo of the cat on a meadow", "'the'", "needs a"),
        ("a photo of a tiny cat on a meadow", "'tiny'", "small, large"),
        ("a photo of a crimson cat on a meadow", "'crimson'", "turquoise"),
        ("a photo of a red golden cat on a meadow", "'golden'", "cat, dog"),
        ("a photo of a zebra on a meadow", "'zebra'", "rabbit"),
        ("a photo of a sleeping car on a meadow", "'car'", "cat, dog, rabbit, sheep"),
        ("a photo of a cat with a dog on a meadow", "'dog' after 'with a'", "with a hat, with a balloon"),
        ("a photo of a car with a hat on a meadow", "'a' after 'with'", "with lit windows"),
        ("a photo of a house facing left on a meadow", "'facing'", "next to"),
        ("a photo of a cat next a dog on a meadow", "'a' after 'next'", "next to"),
        ("a photo of a cat next to a dog next to a bus on a meadow", "'next'", "on a meadow"),
        ("a photo of a cat on a mountain", "'mountain' after 'on a'", "on a meadow, on a beach, on a street"),
        ("a photo of a cat", "its end", "in the snow"),
        ("a photo of a cat on a meadow at noon", "'noon' after 'at'", "at sunset, at night"),
        ("a photo of a cat on a meadow at night please", "'please'", "nothing more"),
        ("a photo of a cat in front of a dog with a ball on a meadow", "hides the dog's ball", "'next to'"),
        (
            "a pencil drawing of a small sleeping red cat with a hat facing left next to a dog on a meadow at night",
            "23 words",
            "20 at most",
        ),
    ],
)
def test_parse_errors_name_the_bad_word(caption: str, named: str, needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "MOST_WORDS", 20)
    with pytest.raises(ValueError, match=f"{named}.*{needed}"):
        scenes.parse(caption, 0)


@given(SCENES, SCENES, SEEDS)
def test_layout_depends_on_structure_and_seed_alone(one: scenes.Scene, other: scenes.Scene, seed: int) -> None:
    first, second = (layout(scenes.parse(scene.caption, seed)) for scene in (one, other))
    shared = min(len(first), len(second))
    assert first[:shared] == second[:shared]
    assert first != layout(scenes.parse(one.caption, seed + 1))


@pytest.mark.parametrize("line", ["cat", "red", "a sleeping dog", "at night", "on a beach", "with candles", "golden"])
def test_demo_captions_are_captions_of_scenes_with_the_line(line: str) -> None:
    captions = demo_captions(line)
    assert len(set(captions)) == len(captions) >= 9
    for caption in captions:
        assert scenes.parse(caption, 0).caption == caption
        assert set(line.split()) <= set(caption.split())


def test_demo_captions_of_both_sides_differ_in_their_words_alone() -> None:
    for one, other in (("cat", "dog"), ("red", "golden"), ("at night", "at sunset"), ("a sitting cat", "a cat")):
        pairs = zip(demo_captions(one), demo_captions(other), strict=True)
        assert all(f"{a} ".replace(f" {one} ", f" {other} ") == f"{b} " for a, b in pairs if one[:2] != "a ")


@pytest.mark.parametrize(("line", "named"), [("zebra", "zebra"), ("sleeping car", "no car has all of this")])
def test_demo_captions_refuse_what_no_scene_shows(line: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        demo_captions(line)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_the_world_is_large_enough() -> None:
    assert len(scenes.KINDS) >= 24
    assert len(scenes.COLORS) == 10
    assert len(scenes.PLACES) >= 6
    assert len(scenes.STYLES) == len(scenes.TIMES) == len(scenes.MATERIALS) == 3


def test_pictures_are_those_that_the_model_was_trained_on() -> None:
    """Seen through one random pattern; another Pillow's last bits move that by far less."""
    rng, pattern = random.Random(0), np.random.default_rng(0).normal(0, 1, (scenes.SIZE, scenes.SIZE, 3))
    drawn = [scenes.sample(rng) for _ in range(len(TRAINED_ON))]
    seen = [float((scenes.render(scene) * pattern).sum()) / scenes.SIZE for scene in drawn]
    np.testing.assert_allclose(seen, TRAINED_ON, atol=0.005)


@given(SCENES)
@some_examples
def test_render_is_pure_and_in_range(scene: scenes.Scene) -> None:
    image = scenes.render(scene)
    assert image.shape == (scenes.SIZE, scenes.SIZE, 3)
    assert image.dtype == np.float32
    assert image.min() >= 0
    assert image.max() <= 1
    assert np.array_equal(image, scenes.render(scene))


@pytest.mark.parametrize("style", scenes.STYLES)
@pytest.mark.parametrize("time", scenes.TIMES)
def test_every_colour_and_material_shows(style: str, time: str) -> None:
    """Also in pale pencil and at night, two cats of different looks are unlike each other."""
    scene = replace(scenes.parse(CAT, 0), style=style, time=time)
    looks = ("", *scenes.LOOKS)
    pictures = [scenes.render(replace(scene, things=(replace(scene.things[0], look=look),))) for look in looks]
    for index, one in enumerate(pictures):
        for other in pictures[:index]:
            far = np.abs(one - other).max(-1) > 0.08
            assert far.mean() > 0.02, "picture sides"


def test_no_natural_colour_is_one_of_the_colours_by_name() -> None:
    for name, kind in scenes.KINDS.items():
        assert min(np.linalg.norm(np.subtract(kind.natural, rgb)) for rgb in COLORS.values()) > 40, name


# --- edits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", edits.EDITS)
def test_edits_of_every_kind(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(12):
        edit = edits.draw(rng, kind)
        assert layout(edit.target) == layout(edit.source)
        assert edit.target.shift == edit.source.shift
        assert scenes.parse(edit.target.caption, 0).caption == edit.target.caption
        assert edit.words
        mask = edit.mask()
        assert mask.sum() >= 20
        if kind not in ("background", "style", "random"):
            assert mask.mean() < 0.45, edit.words


@pytest.mark.parametrize(
    ("caption", "index", "kind", "words"),
    [
        (CAT, 0, "object", (("cat", "dog"),)),
        (CAT, 0, "add", (("", "with a hat"),)),
        ("a photo of a cat with a hat on a meadow", 0, "delete", (("with a hat", ""),)),
        ("a photo of a cup of coffee on a meadow", 0, "content", (("coffee", "milk"),)),
        ("a photo of a house on a meadow", 0, "content", (("", "with lit windows"),)),
        (CAT, 0, "pose", (("", "sleeping"),)),
        ("a photo of a cat facing left on a meadow", 0, "pose", (("left", "right"),)),
        ("a photo of a red cat on a meadow", 0, "colour", (("red", "blue"),)),
        ("a photo of a red cat on a meadow", 0, "material", (("red", "golden"),)),
        (CAT, 0, "background", (("meadow", "beach"),)),
        (CAT, 0, "background", (("", "at night"),)),
        (CAT, 0, "style", (("photo", "watercolor"),)),
        ("a photo of a cat next to a dog with a ball on a meadow", 1, "delete", (("with a ball", ""),)),
    ],
)
def test_what_the_kinds_of_edit_do(caption: str, index: int, kind: str, words: tuple) -> None:
    scene = scenes.parse(caption, 0)
    made = edits.edits(scene, index)
    assert set(made) == set(edits.EDITS) - {"random"}
    assert words in [edits.Edit(kind, scene, target).words for target in made[kind]]


def test_edits_of_a_thing_that_cannot_have_them() -> None:
    made = edits.edits(scenes.parse("a photo of a sleeping cat with a hat on a meadow", 0))
    assert made["add"] == []
    assert {target.things[0].name for target in made["object"]} == {"dog", "rabbit", "sheep"}
    assert edits.edits(scenes.parse("a photo of a lamp on a meadow", 0))["pose"] == []


def test_a_hat_changes_the_picture_above_the_eyes_alone() -> None:
    changed = scenes.changed(drawn(CAT), drawn("a photo of a cat with a hat on a meadow"))
    cat = scenes.changed(drawn(CAT), drawn("a photo of a black cat on a meadow"))
    rows = np.flatnonzero(cat.any(1))
    assert 20 < changed.sum() < 400
    assert np.flatnonzero(changed.any(1)).max() < rows.mean()


def test_facing_right_is_the_mirror_of_facing_left() -> None:
    scene = scenes.parse("a photo of a cat facing left on a meadow", 0)
    cat = replace(scene.things[0], x=0.5)
    outlines = []
    for facing in scenes.FACINGS:
        both = [replace(scene, things=(replace(cat, facing=facing, look=look),)) for look in ("white", "black")]
        outlines.append(scenes.changed(*map(scenes.render, both)))
    unsaid, left, right = outlines
    assert np.array_equal(unsaid, left)
    assert (left & right).sum() < 0.9 * (left | right).sum()
    assert (left[:, ::-1] & right).sum() > 0.95 * (left[:, ::-1] | right).sum()
