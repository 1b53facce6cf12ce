"""The sentences that an edit direction is the mean of: typed ones as they are, or words put into ready ones.

pix2pix-zero (arXiv 2302.03027, section 3.2) has a language model write a thousand of them. A fixed list does without.
"""

from __future__ import annotations

import re

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


def as_written(line: str) -> list[str]:
    return [line]


def templated(line: str) -> list[str]:
    """The line, a thing with its article, in each template."""
    return [template.format(with_article(line)) for template in TEMPLATES]


def with_article(phrase: str) -> str:
    """ "cat" as "a cat", "old cat" as "an old cat"; "the cat" and "two cats" as they are."""
    if DETERMINED.match(phrase):
        return phrase
    return f"an {phrase}" if VOWEL.match(phrase) else f"a {phrase}"
