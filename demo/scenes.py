"""Procedural scenes whose caption and pixels correspond exactly, so that every prompt edit has one true answer image.

A `Scene` is a handful of words plus layout numbers that do not depend on the words: swapping a word keeps the layout.
`render` is a pure function of the scene. Pure numpy; nothing here knows about torch or the host.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..host.quote import quoted

SIZE = 64  # pixels a side

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLORS = {
    "red": (214, 48, 49),
    "yellow": (250, 210, 50),
    "green": (46, 160, 67),
    "blue": (38, 92, 210),
    "purple": (135, 60, 180),
    "white": (248, 248, 248),
    "black": (34, 34, 38),
}
BACKGROUNDS = {
    "gray": (150, 154, 160),
    "pink": (246, 178, 200),
    "blue": (140, 190, 240),
    "green": (160, 215, 165),
    "yellow": (250, 236, 165),
    "brown": (160, 118, 84),
    "white": (238, 238, 236),
}
TEXTURES = ("", "striped", "checkered")
RELATIONS = ("next to", "above")
RADII_ALONE = {"small": (8.5, 10.5), "": (13.0, 15.5), "large": (19.0, 21.5)}
RADII_PAIR = {"small": (6.0, 7.0), "": (9.0, 10.5), "large": (12.5, 14.0)}
SIZES = tuple(RADII_ALONE)


@dataclass(frozen=True)
class Thing:
    """One object. `x`, `y` and `r` in [0, 1] place it within the range that its scene allows."""

    size: str
    color: str
    shape: str
    x: float = 0.5
    y: float = 0.5
    r: float = 0.5

    def __str__(self) -> str:
        return " ".join(word for word in ("a", self.size, self.color, self.shape) if word)


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; `relation` says how the second lies to the first ("" for one thing)."""

    things: tuple[Thing, ...]
    relation: str
    texture: str
    background: str

    @property
    def caption(self) -> str:
        things = f" {self.relation} ".join(str(thing) for thing in self.things)
        return f"{things} on a {self.texture + ' ' if self.texture else ''}{self.background} background"

    def circles(self) -> list[tuple[float, float, float]]:
        """Centre x, centre y and radius of every thing, in pixels."""
        if len(self.things) == 1:
            (thing,) = self.things
            radius = _between(RADII_ALONE[thing.size], thing.r)
            return [(32 + (thing.x - 0.5) * 14, 31 + (thing.y - 0.5) * 12, radius)]
        circles = []
        for side, thing in zip((-1, 1), self.things, strict=True):
            radius = _between(RADII_PAIR[thing.size], thing.r)
            if self.relation == "next to":
                circles.append((32 + side * 16 + (thing.x - 0.5) * 3, 31 + (thing.y - 0.5) * 16, radius))
            else:
                circles.append((32 + (thing.x - 0.5) * 16, 31.5 + side * 15.5 + (thing.y - 0.5) * 2, radius))
        return circles


def parse(caption: str, seed: int) -> Scene:
    """The scene of a caption, laid out by `seed`. Captions of equal structure and seed share their layout.

    Raises ValueError, naming the word, for a caption outside the demo model's small language.
    """
    words = caption.lower().replace(",", " ").split()
    reader = _CaptionReader(words)
    layout = random.Random(seed)
    things = [reader.thing(layout)]
    relation = reader.relation()
    if relation:
        things.append(reader.thing(layout))
    texture, background = reader.ground()
    for thing in things:
        if thing.color == background:
            raise ValueError(f"A {thing.color} {thing.shape} cannot be seen on a {background} background: change one.")
    return Scene(tuple(things), relation, texture, background)


class _CaptionReader:
    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.at = 0

    def take(self, choices: tuple[str, ...], what: str) -> str:
        """The next word, one of `choices`; an optional word is one whose choices include ""."""
        word = self.words[self.at] if self.at < len(self.words) else "the end"
        if word in choices:
            self.at += 1
            return word
        if "" in choices:
            return ""
        raise ValueError(f"The Demo Scene caption has {quoted(word)} where it needs {what}: {', '.join(choices)}.")

    def thing(self, layout: random.Random) -> Thing:
        self.take(("a",), "the word")
        size = self.take(SIZES, "a size")
        color = self.take(tuple(COLORS), "a colour")
        shape = self.take(SHAPES, "a shape")
        return Thing(size, color, shape, layout.random(), layout.random(), layout.random())

    def relation(self) -> str:
        """ "next to", "above", or "" where the ground follows. The word "on" is left to `ground`."""
        word = self.take(("next", "above", "on"), "one of the words")
        if word == "next":
            return f"next {self.take(('to',), 'the word')}"
        if word == "on":
            self.at -= 1
            return ""
        return word

    def ground(self) -> tuple[str, str]:
        self.take(("on",), "the word")
        self.take(("a",), "the word")
        texture = self.take(TEXTURES, "a texture")
        background = self.take(tuple(BACKGROUNDS), "a background colour")
        self.take(("background",), "the word")
        if self.at < len(self.words):
            raise ValueError(f"The Demo Scene caption goes on after 'background' with {quoted(self.words[self.at])}.")
        return texture, background


def sample(rng: random.Random, pair: bool | None = None) -> Scene:
    """A random scene; `pair` forces two things or one (default: two in 40 % of the scenes)."""
    background = rng.choice(list(BACKGROUNDS))
    texture = rng.choices(TEXTURES, (0.5, 0.25, 0.25))[0]
    pair = rng.random() < 0.4 if pair is None else pair
    colors = [color for color in COLORS if color != background]
    things = tuple(
        Thing(
            rng.choices(SIZES, (0.3, 0.4, 0.3))[0],
            rng.choice(colors),
            rng.choice(SHAPES),
            rng.random(),
            rng.random(),
            rng.random(),
        )
        for _ in range(2 if pair else 1)
    )
    return Scene(things, rng.choice(RELATIONS) if pair else "", texture, background)


def edits(scene: Scene, index: int = 0) -> dict[str, list[Scene]]:
    """Every one-word swap of `scene` by kind (colour, shape, size of thing `index`; background; texture)."""
    thing = scene.things[index]

    def with_thing(**words: str) -> Scene:
        things = list(scene.things)
        things[index] = replace(thing, **words)
        return replace(scene, things=tuple(things))

    taken = {thing.color for thing in scene.things}
    return {
        "color": [with_thing(color=c) for c in COLORS if c not in (thing.color, scene.background)],
        "shape": [with_thing(shape=s) for s in SHAPES if s != thing.shape],
        "size": [with_thing(size=s) for s in SIZES if s and thing.size and s != thing.size],
        "background": [replace(scene, background=b) for b in BACKGROUNDS if b != scene.background and b not in taken],
        "texture": [replace(scene, texture=t) for t in TEXTURES if t and scene.texture and t != scene.texture],
    }


def additions(scene: Scene, index: int = 0) -> dict[str, list[Scene]]:
    """Every scene that one word more makes of `scene` by kind (size of thing `index`; texture)."""
    things = list(scene.things)

    def sized(size: str) -> Scene:
        return replace(scene, things=(*things[:index], replace(things[index], size=size), *things[index + 1 :]))

    return {
        "size": [sized(s) for s in SIZES if s and not things[index].size],
        "texture": [replace(scene, texture=t) for t in TEXTURES if t and not scene.texture],
    }


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene: [64, 64, 3] float32 in [0, 1], anti-aliased."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
    ground = np.array(BACKGROUNDS[scene.background], np.float32) / 255
    image = ground * (1 - 0.2 * _texture(scene.texture, x, y)[..., None])
    image = image * (1.04 - 0.12 * y / SIZE)[..., None]
    placed = list(zip(scene.things, scene.circles(), strict=True))
    for thing, (cx, cy, radius) in placed:  # every soft shadow lies below every thing
        shadow = np.clip(0.5 - distance(thing.shape, x - cx - 1.2, y - cy - 2.4, radius) / 5, 0, 1)
        image = image * (1 - 0.28 * shadow)[..., None]
    for thing, (cx, cy, radius) in placed:
        cover = np.clip(0.5 - distance(thing.shape, x - cx, y - cy, radius), 0, 1)[..., None]
        shade = 1.06 - 0.20 * np.clip((y - cy + radius) / (2 * radius), 0, 1)
        glint = 0.16 * np.exp(-((x - cx + 0.35 * radius) ** 2 + (y - cy + 0.4 * radius) ** 2) / (0.45 * radius) ** 2)
        color = np.array(COLORS[thing.color], np.float32) / 255 * shade[..., None] + glint[..., None]
        image = image * (1 - cover) + color * cover
    return np.clip(image, 0, 1).astype(np.float32)


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """[H, W] bool: the pixels where two rendered pictures differ visibly (by more than 2/255 in any channel)."""
    return np.abs(before - after).max(-1) > 2 / 255


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels (negative inside) of a shape of the given radius around the origin, y downwards."""
    return _DISTANCES[shape](x, y, radius)


def _between(bounds: tuple[float, float], at: float) -> float:
    low, high = bounds
    return low + (high - low) * at


def _texture(texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How dark the pattern makes each pixel, 0 to 1."""

    def bars(u: np.ndarray, slope: float) -> np.ndarray:
        return np.clip((np.abs(u % 16 - 8) - 4) * slope + 0.5, 0, 1)

    if texture == "striped":
        return bars(x + y, 0.7071)
    if texture == "checkered":
        across, down = bars(x, 1.0), bars(y, 1.0)
        return across * (1 - down) + down * (1 - across)
    return np.zeros_like(x)


def _circle(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.hypot(x, y) - radius


def _square(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    half, corner = radius * 0.86, radius * 0.12
    qx, qy = np.abs(x) - half + corner, np.abs(y) - half + corner
    return np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0) - corner


def _cross(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    qx, qy = long - radius * 1.02, short - radius * 0.36
    k = np.maximum(qx, qy)
    outside = k > 0
    wx = np.where(outside, qx, radius * 0.36 - long)
    wy = np.where(outside, qy, -k)
    return np.sign(k) * np.hypot(np.maximum(wx, 0), np.maximum(wy, 0))


def _heart(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    scale = radius * 1.72
    x, y = np.abs(x) / scale, 0.52 - y / scale  # tip at the origin, y upwards
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    m = 0.5 * np.maximum(x + y, 0)
    body = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - m) ** 2 + (y - m) ** 2)) * np.sign(x - y)
    return np.where(x + y > 1, lobe, body) * scale


def _polygon(points: list[tuple[float, float]]) -> Callable[[np.ndarray, np.ndarray, float], np.ndarray]:
    def signed_distance(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
        corners = [(px * radius, py * radius) for px, py in points]
        nearest = np.full(x.shape, np.inf, np.float32)
        sign = np.ones_like(x)
        for (ax, ay), (bx, by) in zip(corners, corners[-1:] + corners[:-1], strict=True):
            ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
            t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, (wx - ex * t) ** 2 + (wy - ey * t) ** 2)
            crossings = np.stack((y >= ay, y < by, ex * wy > ey * wx))
            sign = np.where(crossings.all(0) | ~crossings.any(0), -sign, sign)
        return sign * np.sqrt(nearest)

    return signed_distance


_STAR = [
    (np.sin(k * np.pi / 5) * (1.15 if k % 2 == 0 else 0.5), -np.cos(k * np.pi / 5) * (1.15 if k % 2 == 0 else 0.5))
    for k in range(10)
]
_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _polygon([(0, -1.08), (1.08, 0.82), (-1.08, 0.82)]),
    "star": _polygon(_STAR),
    "heart": _heart,
    "cross": _cross,
}
