"""The sentences that an edit direction is the mean of: typed ones as they are, or words put into ready ones.

pix2pix-zero (arXiv 2302.03027, section 3.2) has a language model write a thousand of them. A fixed list does without.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product

from ..demo import scenes

TEMPLATES = (
    "a photo of {}",
    "a good photo of {}",
    "a close-up photo of {}",
    "a bright photo of {}",
    "a dark photo of {}",
    "a black and white photo of {}",
    "a low resolution photo of {}",
    "a cropped photo of {}",
    "a picture of {}",
    "a painting of {}",
    "a drawing of {}",
    "a watercolor of {}",
    "an illustration of {}",
    "an old picture of {}",
    "a postcard with {} on it",
    "a poster that shows {}",
    "{}",
    "{} on a table",
    "{} on a white background",
    "{} in a garden",
    "{} in a forest",
    "{} in the snow",
    "{} in the rain",
    "{} in a city street",
    "{} in a living room",
    "{} in front of a house",
    "{} in front of a mountain",
    "{} by the sea",
    "{} by a river",
    "{} by a window",
    "{} near a tree",
    "{} next to a bench",
    "{} under a blue sky",
    "{} at night",
    "{} at sunset",
    "{} in the morning light",
    "{} seen from above",
    "{} seen from the side",
    "{} from far away",
    "{} in the middle of the picture",
    "there is {} here",
    "there is {} on the left",
    "this is {}",
    "we can see {}",
    "someone is looking at {}",
    "everybody likes {}",
    "a child is pointing at {}",
    "I took a picture of {} yesterday",
)
DETERMINED = re.compile(
    "(an?|the|this|that|these|those|some|any|many|several|few|more|most|all|both|no|my|your|his|her|its|our|their|"
    r"one|two|three|four|five|six|seven|eight|nine|ten|\d+)(?!\S)",
    re.IGNORECASE,
)
# As spoken: a European, a unicorn, but an unimportant thing; an hour, an X-ray.
VOWEL = re.compile(
    "(?!eu|ewe|one-|once|uk|ufo|uni(?![dmn])|us[aeu]|uten)[aeiou]|hour|hono|hones|heir|x-", re.IGNORECASE
)
# Colours that things and grounds of a scene do not share: every sentence fits either side.
GROUNDS = ("gray", "pink", "brown")
THINGS = ("red", "purple", "black")


def as_written(line: str) -> list[str]:
    return [line]


def templated(line: str) -> list[str]:
    """The line, a thing with its article, in each template."""
    return [template.format(with_article(line)) for template in TEMPLATES]


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


SENTENCES: dict[str, Callable[[str], list[str]]] = {
    "as written": as_written,
    "templates": templated,
    "demo captions": demo_captions,
}


def with_article(phrase: str) -> str:
    """ "cat" as "a cat", "old cat" as "an old cat"; "the cat" and "two cats" as they are."""
    if DETERMINED.match(phrase):
        return phrase
    return f"an {phrase}" if VOWEL.match(phrase) else f"a {phrase}"


def _spoken(*words: str) -> str:
    return " ".join(filter(None, words))
