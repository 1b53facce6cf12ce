"""Scores pictures against captions: reads a scene back from its pixels, and compares.

Reading is analysis by synthesis, with the renderer and nothing learned: find the place, then the outlines that explain
best what is not place, then the words and the layout whose rendering comes closest to the picture.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
from PIL import Image

from . import scenes
from .drawing import COLORS, GROUND, MATERIALS, SPAN, TOP
from .places import SHIFTS, view
from .scenes import FACINGS, KINDS, LOOKS, PLACES, RELATIONS, SIZE, STYLES, TIMES, Scene, Thing
from .styles import styled
from .things import PLAIN, draw_in

HALF = SIZE // 2  # outlines are sought at half size
_WINDOW, _FOOT = 60, 55  # side of the window of an outline, at half size, and its row where the foot stands
_BLOCK = 4  # pixels a side, at half size, that are seen as one
_BLOCKS = (_WINDOW // _BLOCK) ** 2
_TRIES = (6, 28)  # likely things that are fitted to the picture in earnest, and where that leaves too much rest
_SURE = 0.045  # too much
_SHORT = 0.2  # of the gain of the best guess at how many things there are: what another, looked into, may lack
_LEAST = -4.0  # `r` of the smallest thing that is looked for: half the side that its size allows
REST = 0.2  # mean error of a square of _PATCH pixels a side that tells of something the reading does not hold
_PATCH = 16


@dataclass(frozen=True)
class Reading:
    """The scene that a picture shows, and the mean error of the square that the scene explains worst."""

    scene: Scene
    rest: float


def judge(image: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Whether a [128, 128, 3] picture in [0, 1] shows `scene`, word kind by word kind and in all.

    What is said of things must be right for every one of them, in order. Where a word is not said, what stands for it
    (a standing cat of its natural colour) must be right as well.
    """
    reading = read(image)
    verdict = agreement(reading.scene, scene)
    there = all(thing.r > _LEAST + 0.5 for thing in reading.scene.things)
    verdict["count"] = verdict["count"] and there and reading.rest < REST
    return verdict | {"all": all(verdict.values())}


def agreement(one: Scene, other: Scene) -> dict[str, bool]:
    """In which kinds of words two scenes agree."""

    def agree(word: str) -> bool:
        return [getattr(thing, word) for thing in one.things] == [getattr(thing, word) for thing in other.things]

    def faces_right(scene: Scene) -> list[bool]:
        return [thing.facing == FACINGS[2] for thing in scene.things]

    return {
        "style": one.style == other.style,
        "place": one.place == other.place,
        "time": one.time == other.time,
        "count": len(one.things) == len(other.things),
        "relation": one.relation == other.relation,
        "thing": agree("name"),
        "size": agree("size"),
        "look": agree("look"),
        "pose": agree("pose"),
        "extra": agree("extra"),
        "facing": faces_right(one) == faces_right(other),
    }


def read(image: np.ndarray) -> Reading:
    """The scene of a [128, 128, 3] picture in [0, 1]. Soft, noisy and slightly miscoloured pictures are fine."""
    image = np.asarray(image, np.float32)
    style, place, time, shift = read_place(image)
    guesses = [_guess(image, Scene(style, (), relation, place, time, shift)) for relation in ("", *RELATIONS)]
    most = max(guess.gain for guess in guesses)
    guesses = [guess for guess in guesses if most - guess.gain <= _SHORT * abs(most)]
    for tries in _TRIES:
        best = _said(min((_fit(image, guess, tries) for guess in guesses), key=lambda fit: fit.misfit).scene)
        reading = Reading(best, worst(image - scenes.render(best)))
        if reading.rest < _SURE:
            break
    return reading


def worst(difference: np.ndarray) -> float:
    """The mean error of the square of _PATCH pixels a side where it is largest, noise averaged out."""
    error = np.abs(_halved(_halved(difference))).mean(-1)
    n = _PATCH // 4
    return float(np.lib.stride_tricks.sliding_window_view(error, (n, n)).mean((-2, -1)).max())


# --- the place -------------------------------------------------------------------------------------------------------


def _halved(image: np.ndarray) -> np.ndarray:
    """[..., height, width, c] at half the size, by the mean."""
    *more, height, width, channels = image.shape
    return image.reshape(*more, height // 2, 2, width // 2, 2, channels).mean((-4, -2))


@cache
def _places() -> tuple[list[tuple[str, str, str, int]], np.ndarray]:
    """Style, place, time and spot of all empty scenes, and their pictures at half size."""
    words = [(s, p, t, k) for s in STYLES for p in PLACES for t in TIMES for k in range(SHIFTS)]
    return words, np.stack([_halved(styled(s, view(p, t, k))) for s, p, t, k in words])


def read_place(image: np.ndarray) -> tuple[str, str, str, int]:
    """Style, place, time and spot of the empty scene that comes closest to a picture."""
    words, pictures = _places()
    misfit = np.minimum(np.abs(pictures - _halved(image)).mean(-1), 0.12)  # capped, so that things weigh little
    return words[int(misfit.mean((1, 2)).argmin())]


@cache
def _strength(style: str) -> np.ndarray:
    """[128, 128, 3]: how much of a difference in a photo a style shows."""
    flat = np.full((SIZE, SIZE, 3), 0.4, np.float32)
    return (styled(style, flat + 0.2) - styled(style, flat)) / 0.2


def _on_place(image: np.ndarray, empty: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What a picture has besides its place, as a photo [64, 64, 3] would have it, and where that shows [64, 64]."""
    strength = _strength(empty.style)
    rest = (image - styled(empty.style, view(empty.place, empty.time, empty.shift))) / np.maximum(strength, 0.3)
    return _halved(rest), (_halved(strength).mean(-1) > 0.3).astype(np.float32)


# --- outlines --------------------------------------------------------------------------------------------------------


@cache
def _variants() -> list[Thing]:
    """Every thing in every pose, with everything it can have, facing either side; size and look are left open."""
    return [
        Thing("", pose, "", name, extra, facing)
        for name, kind in KINDS.items()
        for pose in ("", *kind.poses)
        for extra in ("", *kind.extras)
        for facing in (("", FACINGS[2]) if kind.faces else ("",))
    ]


@dataclass(frozen=True)
class _Outlines:
    """Drawings of every variant in every look and size, in a window, a value for a block of _BLOCK pixels a side.

    `paint` [variants * looks * sizes, blocks * 3] is colour times cover, `cover` [variants * sizes, blocks].
    """

    paint: np.ndarray
    cover: np.ndarray


@cache
def _outlines() -> tuple[_Outlines, _Outlines]:
    """Those of a single thing and those of one of two."""
    drawn = {}
    for thing in _variants():
        if not thing.facing:
            # Drawings are all but linear in their colour: black and white tell all of them.
            stuffs = [((0, 0, 0), ""), ((255, 255, 255), ""), *((PLAIN, material) for material in MATERIALS)]
            drawn[thing] = [draw_in(thing.name, *stuff, thing.pose, thing.extra, False) for stuff in stuffs]
    return _shrunk(drawn, scenes.SIDES_ALONE), _shrunk(drawn, scenes.SIDES_PAIR)


def _shrunk(drawn: dict[Thing, list[Image.Image]], sides: dict[str, float]) -> _Outlines:
    paints, covers = [], []
    for thing in _variants():
        if thing.facing:  # follows the one that faces left
            paints.append(paints[-1][:, :, :, ::-1])
            covers.append(covers[-1][:, :, ::-1])
            continue
        windows = [[_in_window(drawing, side) for side in sides.values()] for drawing in drawn[thing]]
        black, white, *materials = np.array(windows)
        colors = np.array([KINDS[thing.name].natural, *COLORS.values()], np.float32)[:, None, None, None] / 255
        colored = black[..., :3] + colors * (white - black)[..., :3]
        paints.append(np.concatenate((colored, np.stack(materials)[..., :3])))
        covers.append(black[..., 3])
    return _Outlines(np.stack(paints).reshape(-1, _BLOCKS * 3), np.stack(covers).reshape(-1, _BLOCKS))


def _in_window(drawing: Image.Image, side: float) -> np.ndarray:
    """[rows, columns, 4]: colour times cover, and cover, of a drawing on its foot in a window."""
    width = round(SPAN / 4 * side)
    picture = np.asarray(drawing.resize((width, width), Image.Resampling.BOX), np.float32) / 255
    window = np.zeros((_WINDOW, _WINDOW, 4), np.float32)
    top, left = _FOOT - round((GROUND - TOP) / SPAN * width), (_WINDOW - width) // 2
    window[top : top + width, left : left + width] = picture * np.append(np.ones(3), 0) * picture[..., 3:]
    window[top : top + width, left : left + width, 3] = picture[..., 3]
    return _blocks(window)


def _blocks(window: np.ndarray) -> np.ndarray:
    """[..., _WINDOW, _WINDOW, c] to its blocks, by the mean."""
    n = _WINDOW // _BLOCK
    return window.reshape(*window.shape[:-3], n, _BLOCK, n, _BLOCK, window.shape[-1]).mean((-4, -2))


def _corners(relation: str, index: int) -> list[tuple[float, float]]:
    """Where the foot of the thing of an index stands at `x` = `y` = 0 and at 1, in pixels."""
    count = 2 if relation else 1
    at = [(Thing("", "", "", "cat", x=share, y=share),) * count for share in (0, 1)]
    return [Scene("", things, relation, "meadow").spots()[index][:2] for things in at]


def _spots(relation: str, index: int) -> list[tuple[float, float, int, int]]:
    """Where the thing of an index can stand: `x` and `y` of its layout, column and row at half size."""
    (left, top), (right, bottom) = _corners(relation, index)
    columns = range(int(left / 2 + 0.5), int(right / 2 + 0.5) + 1)
    rows = range(int(top / 2 + 0.5), int(bottom / 2 + 0.5) + 1)
    return [((2 * c - left) / (right - left), (2 * r - top) / (bottom - top), c, r) for c, r in product(columns, rows)]


@dataclass(frozen=True)
class _Likely:
    """A thing where and as it explains a picture best, by how much it lessens the squared error."""

    thing: Thing
    gain: float
    cover: np.ndarray  # [64, 64]


def _likely(
    rest: np.ndarray, ground: np.ndarray, free: np.ndarray, light: np.ndarray, relation: str, index: int
) -> list[_Likely]:
    """Things that explain the most of the rest of a photo that is not ground, best first.

    The pictures [64, 64, 3] are looked at where they are free [64, 64]. Every name comes once in each size and facing.
    """
    outlines, spots = _outlines()[bool(relation)], _spots(relation, index)
    seen = np.concatenate((rest, ground, free[..., None]), -1)
    padded = np.pad(seen, ((_WINDOW, _WINDOW), (_WINDOW, _WINDOW), (0, 0)))
    corners = [(row - _FOOT + _WINDOW, column + _WINDOW // 2) for _, _, column, row in spots]
    windows = _blocks(np.stack([padded[top : top + _WINDOW, left : left + _WINDOW] for top, left in corners]))
    rest, ground, weight = (part.reshape(len(spots), _BLOCKS, -1) for part in np.split(windows, (3, 6), -1))

    def along(field: np.ndarray) -> np.ndarray:
        return field.reshape(len(spots), -1).T

    # The error falls by |rest|^2 - |rest - (paint - cover * ground)|^2, weighted; sums over blocks are products.
    paint, cover = outlines.paint, outlines.cover
    looks, sizes = len(LOOKS) + 1, len(scenes.SIZES)
    per_look = (len(_variants()), looks, sizes, -1)
    shared = np.repeat(cover.reshape(len(_variants()), 1, sizes, -1), looks, 1).reshape(len(paint), -1)
    gains = 2 * paint @ along(weight * light * rest) - paint**2 @ along(weight * np.broadcast_to(light**2, rest.shape))
    gains += 2 * (paint * np.repeat(shared, 3, 1)) @ along(weight * light * ground)
    of_cover = 2 * cover @ along((weight * rest * ground).sum(-1)) + cover**2 @ along((weight * ground**2).sum(-1))
    gains = gains.reshape(per_look) - of_cover.reshape(len(_variants()), 1, sizes, -1)
    likely: dict[tuple[str, str, str], _Likely] = {}
    by_size = gains.max((1, 3))
    for at in np.argsort(-by_size, None):
        variant, size = np.unravel_index(at, by_size.shape)
        key = (_variants()[variant].name, scenes.SIZES[size], _variants()[variant].facing)
        if key in likely:
            continue
        look, spot = np.unravel_index(gains[variant, :, size].argmax(), gains[variant, :, size].shape)
        x, y, column, row = spots[spot]
        thing = replace(_variants()[variant], look=("", *LOOKS)[look], size=scenes.SIZES[size], x=x, y=y)
        blocks = cover.reshape(len(_variants()), sizes, _WINDOW // _BLOCK, -1)[variant, size]
        covered = np.zeros((HALF + 2 * _WINDOW, HALF + 2 * _WINDOW), np.float32)
        top, left = row - _FOOT + _WINDOW, column + _WINDOW // 2
        covered[top : top + _WINDOW, left : left + _WINDOW] = blocks.repeat(_BLOCK, 0).repeat(_BLOCK, 1)
        gain = float(gains[variant, look, size, spot])
        likely[key] = _Likely(thing, gain, covered[_WINDOW:-_WINDOW, _WINDOW:-_WINDOW])
    return list(likely.values())


# --- renderings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fit:
    scene: Scene
    misfit: float


def _better(image: np.ndarray, fit: _Fit, others: Iterable[Scene]) -> _Fit:
    """The one of some scenes whose rendering comes closest to the picture."""
    for scene in others:
        misfit = float(np.abs(image - scenes.render(scene)).mean())
        if misfit < fit.misfit:
            fit = _Fit(scene, misfit)
    return fit


@dataclass(frozen=True)
class _Guess:
    """A place and a relation with the likely things, and how much the best of them explain."""

    empty: Scene
    likely: list[list[Thing]]
    gain: float


def _guess(image: np.ndarray, empty: Scene) -> _Guess:
    rest, free = _on_place(image, empty)
    ground = _halved(view(empty.place, empty.time, empty.shift))
    light = scenes.light_on_things(empty.place, empty.time)
    likely, gain = [], 0.0
    for index in range(2 if empty.relation else 1):
        ranked = _likely(rest, ground, free, light, empty.relation, index)
        free = free * (ranked[0].cover < 0.5)
        likely.append([one.thing for one in ranked])
        gain += ranked[0].gain
    return _Guess(empty, likely, gain)


def _fit(image: np.ndarray, guess: _Guess, tries: int) -> _Fit:
    """The scene near the guess that fits the picture best; for every thing so many are tried in earnest."""
    scene = replace(guess.empty, things=tuple(ranked[0] for ranked in guess.likely))
    fit = _better(image, _Fit(scene, np.inf), [scene])
    for index, ranked in enumerate(guess.likely):
        tried = [_better(image, _Fit(scene, np.inf), [_placed(fit.scene, index, thing)]) for thing in ranked]
        tried = sorted(tried, key=lambda one: one.misfit)[:tries]
        fit = min((_dressed(image, one, index) for one in tried), key=lambda one: one.misfit)
    for index in range(len(guess.likely)):
        fit = _dressed(image, fit, index)
    for index in [*range(len(guess.likely))] * 3:
        fit = _moved(image, fit, index)
    scene = fit.scene
    fit = _better(image, fit, (replace(scene, shift=shift) for shift in range(SHIFTS)))
    return _better(image, fit, (replace(fit.scene, time=time) for time in TIMES))


def _dressed(image: np.ndarray, fit: _Fit, index: int) -> _Fit:
    """Finds where a thing stands and all of its words but the name."""
    fit = _moved(image, fit, index)
    thing = fit.scene.things[index]
    looks = [replace(thing, look=look) for look in ("", *LOOKS)]
    fit = _better(image, fit, (_placed(fit.scene, index, other) for other in looks))
    thing = fit.scene.things[index]
    alike = [
        replace(thing, pose=other.pose, extra=other.extra, facing=other.facing)
        for other in _variants()
        if other.name == thing.name
    ]
    alike += [replace(thing, size=size, r=0.5) for size in scenes.SIZES]
    fit = _better(image, fit, (_placed(fit.scene, index, other) for other in alike))
    return _moved(image, fit, index)


def _placed(scene: Scene, index: int, thing: Thing) -> Scene:
    return replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))


def _said(scene: Scene) -> Scene:
    """The same picture, with the relation and the sizes said that come nearest to how things lie."""
    spots = scene.spots()
    relation = scene.relation
    if relation:  # next to each other, the first stands lower by 12 pixels at most, and by 15 at least in front
        relation = RELATIONS[1] if spots[0][1] - spots[1][1] > 13.5 else RELATIONS[0]
    sides = scenes.SIDES_PAIR if relation else scenes.SIDES_ALONE
    things = []
    for index, (thing, (x, y, side)) in enumerate(zip(scene.things, spots, strict=True)):
        (x0, y0), (x1, y1) = _corners(relation, index)
        size = min(sides, key=lambda size: abs(np.log(side / sides[size])))
        r = 10 * side / sides[size] - 9.5
        things.append(replace(thing, size=size, x=(x - x0) / (x1 - x0), y=(y - y0) / (y1 - y0), r=r))
    return replace(scene, things=tuple(things), relation=relation)


def _moved(image: np.ndarray, fit: _Fit, index: int) -> _Fit:
    """Places and sizes a thing by smaller and smaller steps."""
    (x0, y0), (x1, y1) = _corners(fit.scene.relation, index)
    for pixels in (1.5, 0.7):
        for right, down, larger in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0.5, 1), (0, -0.5, 1)):
            thing = fit.scene.things[index]
            moved = []
            for way in (-pixels, pixels):
                x, y = thing.x + way * right / (x1 - x0), thing.y + way * down / (y1 - y0)
                moved.append(replace(thing, x=x, y=y, r=max(thing.r + 0.4 * way * larger, _LEAST)))
            fit = _better(image, fit, (_placed(fit.scene, index, one) for one in moved))
    return fit
