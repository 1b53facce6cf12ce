"""Captions of demo scenes that have some words in common, for edit directions."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from . import scenes

# What stands beside the line's own words, of style, look, place and time.
NAMES = ("cat", "dog", "rabbit", "sheep", "house", "car", "castle", "tree")
SETTINGS = (
    ("a photo of", "blue", "meadow", ""),
    ("a photo of", "red", "beach", ""),
    ("a photo of", "white", "street", "at sunset"),
    ("a photo of", "golden", "room", ""),
    ("a photo of", "black", "snow", ""),
    ("a photo of", "wooden", "forest", "at night"),
    ("a pencil drawing of", "pink", "desert", ""),
    ("a pencil drawing of", "green", "street", ""),
    ("a watercolor of", "purple", "meadow", "at sunset"),
    ("a watercolor of", "yellow", "beach", ""),
)


def demo_captions(line: str) -> list[str]:
    """Demo Scene captions of one thing that have the line's words, with the other words varied.

    The line is any part of a caption, in its order. Raises ValueError for other words than those of demo scenes.
    """
    reader = scenes.PhraseReader(line.lower().removeprefix("a ").split())
    places = {phrase: place for place, phrase in scenes.PLACES.items()}
    style = reader.take(tuple(phrase.removeprefix("a ") for phrase in scenes.STYLES), optional=True)
    reader.take(("a",), optional=True)
    size, pose, look, name, extra, facing, place, time = (
        reader.take(choices, optional=True)
        for choices in (
            scenes.SIZES,
            scenes.POSES,
            scenes.LOOKS,
            tuple(scenes.KINDS),
            scenes.EXTRAS,
            scenes.FACINGS,
            tuple(places),
            scenes.TIMES,
        )
    )
    reader.end()
    words = [scenes.Thing(size, pose, look, one, extra, facing) for one in ([name] if name else scenes.KINDS)]
    fitting = [thing for thing in words if scenes.fits(thing)]
    if not fitting:
        raise ValueError(f"No demo scene shows '{line}': no {name or 'thing'} has all of this.")
    usual = [thing for thing in fitting if thing.name in NAMES] or fitting
    return [
        scenes.Scene(
            f"a {style}" if style else their_style,
            (thing if look else replace(thing, look=their_look),),
            "",
            places[place] if place else their_place,
            time or their_time,
        ).caption
        for thing, (their_style, their_look, their_place, their_time) in product(usual, SETTINGS)
    ]
