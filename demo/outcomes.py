"""What became of an edit: which scene near its source and its target a picture shows.

`score` reads any picture. Of an edited one the layout is known, so that comparing it with the renderings of all scenes
that lie one word from the source or the target does as well, and takes milliseconds once they are drawn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from . import scenes
from .edits import EDITS, Edit, edits
from .scenes import SIZES, Scene, sayable
from .score import REST, agreement, worst


class Verdict(NamedTuple):
    """Whether a picture shows what was asked for, whatever else changed; and whether it shows just that."""

    shown: bool
    only: bool


class Outcomes:
    """The source, the target and the scenes that are one word from either, drawn."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self.scenes = list(dict.fromkeys([edit.target, edit.source, *around(edit.target), *around(edit.source)]))
        self.pictures = np.stack([scenes.render(scene)[::2, ::2] for scene in self.scenes])

    def nearest(self, image: np.ndarray) -> Scene:
        """The scene whose rendering comes closest to a [128, 128, 3] picture in [0, 1]."""
        return self.scenes[int(np.abs(self.pictures - image[::2, ::2]).mean((1, 2, 3)).argmin())]

    def judge(self, image: np.ndarray) -> Verdict:
        found, target = self.nearest(image), self.edit.target
        right, kept = agreement(found, target), agreement(self.edit.source, target)
        rest = worst(image - scenes.render(target)) < REST
        return Verdict(all(right[word] for word in kept if not kept[word]), found == target and rest)


def around(scene: Scene) -> list[Scene]:
    """The scenes that one edit makes of a scene; its sizes and its natural colours among them."""
    found = []
    for index, thing in enumerate(scene.things):
        made = edits(scene, index)
        found += [other for kind in EDITS[:-1] for other in made[kind]]
        changed = [replace(thing, size=size) for size in SIZES if size != thing.size]
        changed += [replace(thing, look="")] if thing.look else []
        found += [replace(scene, things=(*scene.things[:index], one, *scene.things[index + 1 :])) for one in changed]
    return [other for other in found if sayable(other)]
