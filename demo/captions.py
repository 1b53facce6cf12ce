"""Captions of demo scenes that have some words in common, for edit directions."""

from __future__ import annotations

from itertools import product

from . import scenes

# Colours that things and grounds of a scene do not share: every sentence fits either side.
GROUNDS = ("gray", "pink", "brown")
THINGS = ("red", "purple", "black")


def demo_captions(line: str) -> list[str]:
    """Every Demo Scene caption that shows the line's thing or ground, with the other words varied.

    The line may leave out colour or shape of a thing. Raises ValueError for other words than those of demo scenes.
    """
    words = line.lower().removeprefix("a ").split()
    *others, last = words
    if last == "background":
        captions = [_spoken("a", color, shape, "on a", *words) for color in THINGS for shape in scenes.SHAPES]
    else:
        others, shapes = (others, [last]) if last in scenes.SHAPES else (words, scenes.SHAPES)
        colors = [""] if set(others) & set(scenes.COLORS) else scenes.COLORS
        captions = [
            _spoken("a", *others, color, shape, "on a", texture, ground, "background")
            for color, shape, texture, ground in product(colors, shapes, scenes.TEXTURES, GROUNDS)
        ]
    for caption in captions:
        scenes.parse(caption, 0)
    return captions


def _spoken(*words: str) -> str:
    return " ".join(filter(None, words))
