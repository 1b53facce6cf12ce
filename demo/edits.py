"""Edits of demo scenes with their one true answer: the ten kinds that the field's benchmark, PIE-Bench, knows.

Words are exchanged, added or left out; the layout stays.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

import numpy as np

from . import scenes
from .scenes import KINDS, MATERIALS, Scene, Thing

CONTENTS = ("of coffee", "of milk", "with lit windows", "with a face")  # what is in a thing rather than added to it
EDITS = ("object", "add", "delete", "content", "pose", "colour", "material", "background", "style", "random")


@dataclass(frozen=True)
class Edit:
    """An edit; `kind` is one of `EDITS`."""

    kind: str
    source: Scene
    target: Scene

    @property
    def words(self) -> tuple[tuple[str, str], ...]:
        """The words that change, before and after; "" where words are added or left out."""
        before, after = self.source.caption.split(), self.target.caption.split()
        changes = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
        return tuple((" ".join(before[a:b]), " ".join(after[c:d])) for tag, a, b, c, d in changes if tag != "equal")

    def mask(self) -> np.ndarray:
        """[128, 128] bool: the pixels that the edit changes."""
        return scenes.changed(scenes.render(self.source), scenes.render(self.target))


def edits(scene: Scene, index: int = 0) -> dict[str, list[Scene]]:
    """What every kind but the random mix can make of a scene; what concerns a thing is done to the one of `index`."""
    thing = scene.things[index]
    kind = KINDS[thing.name]

    def with_thing(changed: Thing) -> Scene:
        return replace(scene, things=(*scene.things[:index], changed, *scene.things[index + 1 :]))

    def looking(looks: tuple[str, ...]) -> Iterator[Scene]:
        return (with_thing(replace(thing, look=look)) for look in looks if look != thing.look)

    others = [extra for extra in ("", *kind.extras) if extra != thing.extra]
    to = {extra: with_thing(replace(thing, extra=extra)) for extra in others}
    posed = [with_thing(replace(thing, pose=pose)) for pose in ("", *kind.poses) if pose != thing.pose]
    if kind.faces:
        turned = [scenes.FACINGS[1]] if thing.facing == scenes.FACINGS[2] else [scenes.FACINGS[2]]
        posed += [with_thing(replace(thing, facing=facing)) for facing in turned]
    named = [replace(thing, name=name) for name in KINDS]
    added = [extra for extra in others if extra and extra not in CONTENTS]
    made = {
        "object": [with_thing(other) for other in named if other.name != thing.name and scenes.fits(other)],
        "add": [to[extra] for extra in added if not thing.extra],
        "delete": [to[""]] if thing.extra and thing.extra not in CONTENTS else [],
        "content": [to[extra] for extra in others if _is_content(thing.extra, extra)],
        "pose": posed,
        "colour": list(looking(tuple(scenes.COLORS))),
        "material": list(looking(MATERIALS)),
        "background": [replace(scene, place=place) for place in scenes.PLACES if place != scene.place]
        + [replace(scene, time=time) for time in scenes.TIMES if time != scene.time],
        "style": [replace(scene, style=style) for style in scenes.STYLES if style != scene.style],
    }
    return {kind: [target for target in targets if scenes.sayable(target)] for kind, targets in made.items()}


def _is_content(before: str, after: str) -> bool:
    """Whether one thing takes another's place, or the content comes or goes."""
    return bool(before and after) or (before or after) in CONTENTS


def draw(rng: random.Random, kind: str, pair: bool | None = None) -> Edit:
    """A random edit of a kind, of a random scene of two things or one (default: as `scenes.sample`)."""
    while True:
        source = scenes.sample(rng, pair)
        target = _mixed(rng, source) if kind == "random" else _one(rng, source, kind)
        if target is not None:
            return Edit(kind, source, target)


def _one(rng: random.Random, scene: Scene, kind: str) -> Scene | None:
    targets = edits(scene, rng.randrange(len(scene.things)))[kind]
    return rng.choice(targets) if targets else None


def _mixed(rng: random.Random, scene: Scene) -> Scene | None:
    """Two edits of different kinds."""
    target: Scene | None = scene
    for kind in rng.sample(EDITS[:-1], 2):
        target = target and _one(rng, target, kind)
    return target if target and target.caption != scene.caption else None
