"""Scenes of everyday things whose caption and pixels correspond exactly: every prompt edit has one true answer.

A `Scene` is its words plus layout numbers that do not depend on the words: changing words keeps the layout. `render` is
a pure function of the scene. Nothing here knows about torch.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..host.quote import quoted
from .drawing import COLORS, GROUND, LEFT, MATERIALS, SPAN, TOP
from .places import PLACES, SHIFTS, SIZE, TIMES, tint, view
from .styles import STYLES, styled
from .things import KINDS, POSES, draw

LOOKS = (*COLORS, *MATERIALS)
EXTRAS = tuple(dict.fromkeys(extra for kind in KINDS.values() for extra in kind.extras))
RELATIONS = ("next to", "in front of")
FACINGS = ("", "facing left", "facing right")  # a thing that faces either side faces left where nothing is said
SIDES_ALONE = {"small": 42, "": 62, "large": 80}  # pixels, of the [-1, 1] square that a thing is drawn in
SIDES_PAIR = {"small": 34, "": 47, "large": 60}
SIZES = tuple(SIDES_ALONE)
MOST_WORDS = 24


@dataclass(frozen=True)
class Thing:
    """One thing. `look` is its colour or material; "" stands for a word that is not said.

    `x`, `y` and `r` in [0, 1] are where it stands and how large it is exactly, within what its scene allows.
    """

    size: str
    pose: str
    look: str
    name: str
    extra: str = ""
    facing: str = ""
    x: float = 0.5
    y: float = 0.5
    r: float = 0.5

    def __str__(self) -> str:
        said = ("a", self.size, self.pose, self.look, self.name, self.extra, self.facing)
        return " ".join(word for word in said if word)


@dataclass(frozen=True)
class Scene:
    """One or two things at a place; `relation` says how the first lies to the second ("" for one thing)."""

    style: str
    things: tuple[Thing, ...]
    relation: str
    place: str
    time: str = ""
    shift: int = 0  # from which of its spots the place is seen

    @property
    def caption(self) -> str:
        things = f" {self.relation} ".join(str(thing) for thing in self.things)
        return " ".join(word for word in (self.style, things, PLACES[self.place], self.time) if word)

    def spots(self) -> list[tuple[float, float, float]]:
        """Where every thing stands: the x of its middle, the y of its foot, and the side of its square, in pixels."""
        sides = SIDES_ALONE if len(self.things) == 1 else SIDES_PAIR
        middles = {"": ((64, 106),), "next to": ((35, 104), (93, 104)), "in front of": ((42, 114), (88, 94))}
        reach_x, reach_y = {"": (24, 8), "next to": (4, 12), "in front of": (5, 5)}[self.relation]
        return [
            (x + (t.x - 0.5) * reach_x, y + (t.y - 0.5) * reach_y, sides[t.size] * (0.95 + 0.1 * t.r))
            for t, (x, y) in zip(self.things, middles[self.relation], strict=True)
        ]


def parse(caption: str, seed: int) -> Scene:
    """The scene of a caption, laid out by `seed`. Captions of equal structure and seed share their layout.

    Raises ValueError, naming the word and what could stand there, for a caption outside the demo model's language.
    """
    words = caption.lower().replace(",", " ").split()
    if len(words) > MOST_WORDS:
        raise ValueError(f"The Demo Scene caption has {len(words)} words: say it in {MOST_WORDS} at most.")
    reader = PhraseReader(words)
    layout = random.Random(seed)
    style, shift = reader.take(STYLES), layout.randrange(SHIFTS)
    things, relation = [_read_thing(reader, layout)], reader.take(RELATIONS, optional=True)
    if relation:
        things.append(_read_thing(reader, layout))
    where = {phrase: place for place, phrase in PLACES.items()}
    scene = Scene(style, tuple(things), relation, where[reader.take(tuple(where))], reader.take(TIMES), shift)
    reader.end()
    if _hidden(scene):
        first, second = scene.things
        raise ValueError(
            f"A {first.name} in front of a {second.name} hides the {second.name}'s ball: write 'next to', or leave "
            "'with a ball' out."
        )
    return scene


def _read_thing(reader: PhraseReader, layout: random.Random) -> Thing:
    reader.take(("a",))
    size, pose, look = reader.take(SIZES), reader.take(POSES, optional=True), reader.take(LOOKS, optional=True)
    name = reader.take(tuple(name for name, kind in KINDS.items() if not pose or pose in kind.poses))
    extra = reader.take(KINDS[name].extras, optional=True)
    facing = reader.take(FACINGS) if KINDS[name].faces else ""
    return Thing(size, pose, look, name, extra, facing, layout.random(), layout.random(), layout.random())


class PhraseReader:
    """Takes phrases off a list of words, and says what could have stood where none fits."""

    def __init__(self, words: list[str]) -> None:
        self._words = words
        self._at = 0
        self._possible: list[str] = []  # what could stand here, as far as it was asked for

    def take(self, phrases: tuple[str, ...], optional: bool = False) -> str:
        """The one of `phrases` that follows; "" if none does and that is allowed, by `optional` or as one of them."""
        self._possible += [phrase for phrase in phrases if phrase]
        for phrase in phrases:
            if phrase and self._shared(phrase) == len(phrase.split()):
                self._at += len(phrase.split())
                self._possible = []
                return phrase
        if not optional and "" not in phrases:
            self._refuse()
        return ""

    def end(self) -> None:
        if self._at < len(self._words):
            self._refuse()

    def _shared(self, phrase: str) -> int:
        """With how many of its words the rest begins."""
        expected = phrase.split()
        found = self._words[self._at : self._at + len(expected)]
        pairs = zip(found, expected, strict=False)
        return next((n for n, (one, other) in enumerate(pairs) if one != other), len(found))

    def _refuse(self) -> None:
        shared = max(map(self._shared, self._possible), default=0)
        at = self._at + shared
        word = quoted(self._words[at]) if at < len(self._words) else "its end"
        after = f" after '{' '.join(self._words[self._at : at])}'" if shared else ""
        fitting = [phrase for phrase in self._possible if self._shared(phrase) == shared]
        fitting = fitting or ["nothing more"]
        needed = f"one of: {', '.join(fitting)}" if len(fitting) > 1 else fitting[0]
        raise ValueError(f"The Demo Scene caption has {word}{after} where it needs {needed}.")


def _words() -> list[str]:
    phrases = [*STYLES, "a", *SIZES, *POSES, *LOOKS, *KINDS, *FACINGS, *RELATIONS, *PLACES.values(), *TIMES, *EXTRAS]
    return list(dict.fromkeys(word for phrase in phrases for word in phrase.split()))


WORDS = _words()  # every word of a caption


def sample(rng: random.Random, pair: bool | None = None) -> Scene:
    """A random scene; `pair` forces two things or one (default: two in 40 % of the scenes)."""
    pair = rng.random() < 0.4 if pair is None else pair
    while True:
        scene = Scene(
            rng.choices(STYLES, (0.64, 0.18, 0.18))[0],
            tuple(_sample_thing(rng, pair) for _ in range(2 if pair else 1)),
            rng.choice(RELATIONS) if pair else "",
            rng.choice(list(PLACES)),
            rng.choices(TIMES, (0.6, 0.2, 0.2))[0],
            rng.randrange(SHIFTS),
        )
        if sayable(scene):
            return scene


def sayable(scene: Scene) -> bool:
    """Whether `parse` takes the scene's caption."""
    return len(scene.caption.split()) <= MOST_WORDS and not _hidden(scene)


def fits(thing: Thing) -> bool:
    """Whether a thing can have all that is said of it."""
    kind = KINDS[thing.name]
    posed, filled = not thing.pose or thing.pose in kind.poses, not thing.extra or thing.extra in kind.extras
    return posed and filled and (kind.faces or not thing.facing)


def _hidden(scene: Scene) -> bool:
    """Whether the first thing hides the ball of the second."""
    return scene.relation == "in front of" and scene.things[1].extra == "with a ball"


def _sample_thing(rng: random.Random, pair: bool) -> Thing:
    name = rng.choice(list(KINDS))
    kind = KINDS[name]
    plain = 0.75 if pair else 0.55  # how often there is nothing special about it
    return Thing(
        rng.choices(SIZES, (0.2, 0.6, 0.2))[0],
        rng.choice(kind.poses) if kind.poses and rng.random() > plain else "",
        rng.choices(("", rng.choice(list(COLORS)), rng.choice(MATERIALS)), (0.28, 0.5, 0.22))[0],
        name,
        rng.choice(kind.extras) if kind.extras and rng.random() > plain else "",
        rng.choices(FACINGS, (0.5, 0.15, 0.35))[0] if kind.faces else "",
        rng.random(),
        rng.random(),
        rng.random(),
    )


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """[H, W] bool: the pixels where two rendered pictures differ visibly (by more than 2/255 in any channel)."""
    return np.abs(before - after).max(-1) > 2 / 255


_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene: [128, 128, 3] float32 in [0, 1]."""
    photo = view(scene.place, scene.time, scene.shift).copy()
    light = light_on_things(scene.place, scene.time)
    placed = sorted(zip(scene.things, scene.spots(), strict=True), key=lambda pair: pair[1][1])  # the farther first
    if scene.relation == "in front of":
        placed = list(zip(scene.things, scene.spots(), strict=True))[::-1]
    for _, (x, y, side) in placed:
        _shade(photo, x, y, side)
    for thing, (x, y, side) in placed:
        _stand(
            photo, draw(thing.name, thing.look, thing.pose, thing.extra, thing.facing == FACINGS[2]), x, y, side, light
        )
    return np.clip(styled(scene.style, photo), 0, 1).astype(np.float32)


def light_on_things(place: str, time: str) -> np.ndarray:
    """What the light does to the colours of things: they catch more of it than the ground does."""
    return 0.65 * tint(place, time) + 0.35


def _shade(photo: np.ndarray, x: float, y: float, side: float) -> None:
    """A soft shadow on the ground, in place."""
    top, bottom = int(y) - 12, min(SIZE, int(y) + 13)
    rows = slice(top, bottom)
    away = ((_X[rows] - x - 0.04 * side) / (0.46 * side)) ** 2 + ((_Y[rows] - y) / (0.07 * side + 1)) ** 2
    photo[rows] *= (1 - 0.42 * np.exp(-(away**1.5)))[..., None]


def _stand(photo: np.ndarray, drawing: Image.Image, x: float, y: float, side: float, light: np.ndarray) -> None:
    """Pastes a drawing with its foot at (x, y), in place; it is scaled and moved by parts of a pixel in one go."""
    pixel = 2 * drawing.width / (side * SPAN)  # of the drawing, a pixel of the picture
    left, top = x + LEFT * side / 2, y + (TOP - GROUND) * side / 2
    x0, y0 = max(0, int(left)), max(0, int(top))
    x1, y1 = min(SIZE, int(left + SPAN * side / 2) + 1), min(SIZE, int(top + SPAN * side / 2) + 1)
    box = ((x0 - left) * pixel, (y0 - top) * pixel, (x1 - left) * pixel, (y1 - top) * pixel)
    box = (max(0, box[0]), max(0, box[1]), min(drawing.width, box[2]), min(drawing.height, box[3]))
    scaled = drawing.resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS, box)
    picture = np.asarray(scaled, np.float32) / 255
    alpha = picture[..., 3:]
    part = photo[y0:y1, x0:x1]
    part += (picture[..., :3] * light - part) * alpha
