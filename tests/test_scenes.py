"""The renderer's language and pictures, and the reader that takes the words back out of a picture."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from palimpsest.demo import scenes, score

KINDS = {"color", "shape", "size", "background", "texture"}
SEEDS = st.integers(0, 2**32 - 1)
SCENES = st.builds(lambda seed, pair: scenes.sample(random.Random(seed), pair), SEEDS, st.booleans())

some_examples = settings(max_examples=25, deadline=None)


def draw_scenes(count: int, pair: bool) -> list[scenes.Scene]:
    rng = random.Random(f"{count} {pair}")
    return [scenes.sample(rng, pair) for _ in range(count)]


def layout(scene: scenes.Scene) -> list[tuple[float, float, float]]:
    return [(thing.x, thing.y, thing.r) for thing in scene.things]


def all_edits(scene: scenes.Scene) -> list[tuple[str, int, scenes.Scene]]:
    """Kind of word, index of the thing, and edited scene."""
    return [
        (kind, index, edited)
        for index in range(len(scene.things))
        for kind, choices in scenes.edits(scene, index).items()
        for edited in choices
    ]


def from_outline(scene: scenes.Scene, index: int) -> np.ndarray:
    """[64, 64]: signed distance in pixels to the outline of a thing."""
    y, x = np.mgrid[0 : scenes.SIZE, 0 : scenes.SIZE] + 0.5
    cx, cy, radius = scene.circles()[index]
    return scenes.distance(scene.things[index].shape, x - cx, y - cy, radius)


def noisy(image: np.ndarray) -> np.ndarray:
    return image + np.random.default_rng(0).normal(0, 0.03, image.shape)


def blurred(image: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(image, (0.7, 0.7, 0))


# --- captions --------------------------------------------------------------------------------------------------------


@given(SCENES, SEEDS)
def test_caption_round_trip(scene: scenes.Scene, seed: int) -> None:
    parsed = scenes.parse(scene.caption, seed)
    assert parsed.caption == scene.caption
    placed = [replace(thing, x=own.x, y=own.y, r=own.r) for thing, own in zip(parsed.things, scene.things, strict=True)]
    assert replace(parsed, things=tuple(placed)) == scene


def test_captions_may_have_capitals_and_commas() -> None:
    loose = scenes.parse("A red circle, next to a large blue STAR, on a striped gray background", 3)
    assert loose == scenes.parse("a red circle next to a large blue star on a striped gray background", 3)


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("the red circle on a gray background", "'the'"),
        ("a tiny red circle on a gray background", "'tiny'"),
        ("a crimson circle on a gray background", "'crimson'"),
        ("a red hexagon on a gray background", "'hexagon'"),
        ("a red circle beside a blue star on a gray background", "'beside'"),
        ("a red circle next a blue star on a gray background", "'a'"),
        ("a red circle above a blue star above a black cross on a gray background", "'above'"),
        ("a red circle on a dotted gray background", "'dotted'"),
        ("a red circle on a gray wall", "'wall'"),
        ("a red circle on a gray background please", "'please'"),
        ("a red circle on a gray", "'the end'"),
        ("", "'the end'"),
        ("a blue circle on a blue background", "blue circle cannot be seen"),
        ("a red circle above a white star on a striped white background", "white star cannot be seen"),
    ],
)
def test_parse_errors_name_the_bad_word(caption: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        scenes.parse(caption, 0)


@given(SCENES, SCENES, SEEDS)
def test_layout_depends_on_structure_and_seed_alone(one: scenes.Scene, other: scenes.Scene, seed: int) -> None:
    first, second = (layout(scenes.parse(scene.caption, seed)) for scene in (one, other))
    shared = min(len(first), len(second))
    assert first[:shared] == second[:shared]
    assert first != layout(scenes.parse(one.caption, seed + 1))


# --- edits and pictures ----------------------------------------------------------------------------------------------


@given(SCENES, SEEDS)
@some_examples
def test_edits_swap_one_word_and_parse(scene: scenes.Scene, seed: int) -> None:
    assert set(scenes.edits(scene)) == KINDS
    words = scene.caption.split()
    for _, _, edited in all_edits(scene):
        swaps = [pair for pair in zip(words, edited.caption.split(), strict=True) if pair[0] != pair[1]]
        assert len(swaps) == 1
        assert scenes.parse(edited.caption, seed).caption == edited.caption
        assert layout(edited) == layout(scene)


@given(SCENES, st.randoms(use_true_random=False))
@some_examples
def test_edits_change_the_picture_where_they_should(scene: scenes.Scene, rng: random.Random) -> None:
    before = scenes.render(scene)
    kind, index, edited = rng.choice(all_edits(scene))
    after = scenes.render(edited)
    changed = scenes.changed(before, after)
    assert changed.any()
    assert np.abs(before - after)[~changed].max() <= 2 / 255
    if kind == "color":
        assert from_outline(scene, index)[changed].max() < 0.5
    elif kind in ("shape", "size"):
        shadow = 6  # pixels that a shadow reaches past its outline
        assert np.minimum(from_outline(scene, index), from_outline(edited, index))[changed].max() < shadow
    else:
        assert min(from_outline(scene, at)[changed].min() for at in range(len(scene.things))) > -0.5


@given(SCENES)
@some_examples
def test_render_is_pure_and_in_range(scene: scenes.Scene) -> None:
    image = scenes.render(scene)
    assert image.shape == (scenes.SIZE, scenes.SIZE, 3)
    assert image.dtype == np.float32
    assert image.min() >= 0
    assert image.max() <= 1
    assert np.array_equal(image, scenes.render(scene))


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("spoil", [np.array, noisy, blurred], ids=["clean", "noisy", "blurred"])
def test_reader_finds_the_scene(pair: bool, spoil: Callable[[np.ndarray], np.ndarray]) -> None:
    drawn = draw_scenes(16, pair)
    wrong = [scene.caption for scene in drawn if not score.judge(spoil(scenes.render(scene)), scene)["all"]]
    assert wrong == []


def test_reader_finds_the_layout() -> None:
    for scene in draw_scenes(10, pair=True):
        found = score.read(scenes.render(scene), 2).things
        places = [(thing.x, thing.y, thing.radius) for thing in found]
        np.testing.assert_allclose(places, scene.circles(), atol=1.5)


@pytest.mark.parametrize("pair", [False, True], ids=["one", "two"])
def test_reader_rejects_just_the_word_that_is_off(pair: bool) -> None:
    rng = random.Random(5)
    for scene in draw_scenes(5, pair):
        for index in range(len(scene.things)):
            for kind, choices in scenes.edits(scene, index).items():
                for edited in rng.sample(choices, min(1, len(choices))):
                    verdict = score.judge(scenes.render(edited), scene)
                    wrong = {word for word, right in verdict.items() if not right}
                    assert wrong == {kind, "all"}, f"{edited.caption} taken for {scene.caption}"


@pytest.mark.parametrize("pair", [False, True], ids=["one", "two"])
def test_reader_tells_all_sizes_apart(pair: bool) -> None:
    for scene in draw_scenes(3, pair):
        for size in scenes.SIZES:
            first, *rest = scene.things
            drawn = scenes.render(replace(scene, things=(replace(first, size=size), *rest)))
            assert score.judge(drawn, scene)["size"] == (size == first.size)


def test_reader_minds_how_things_lie() -> None:
    scene = scenes.parse("a red circle next to a small blue star on a gray background", 1)
    above = score.judge(scenes.render(replace(scene, relation="above")), scene)
    assert {word for word, right in above.items() if not right} == {"relation", "all"}
    swapped = score.judge(scenes.render(replace(scene, things=scene.things[::-1])), scene)
    assert {word for word, right in swapped.items() if not right} == {"color", "shape", "size", "all"}


def test_reader_counts() -> None:
    one = scenes.parse("a white square on a checkered green background", 1)
    two = scenes.parse("a white square above a black heart on a checkered green background", 1)
    assert score.read(scenes.render(two), 1).count == 2
    assert score.read(scenes.render(one), 2).count == 1
    for image, scene in ((scenes.render(two), one), (scenes.render(one), two)):
        verdict = score.judge(image, scene)
        assert verdict["background"]
        assert not verdict["count"]
        assert not verdict["all"]
    assert score.read(np.full((64, 64, 3), 0.93, np.float32), 1).things == ()


def test_reader_survives_nonsense() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        image = ndimage.gaussian_filter(rng.normal(0.5, 2, (64, 64, 3)), (2, 2, 0)).clip(0, 1)
        assert score.read(image, 2).count <= 3
