"""What people typed is quoted on one line, and no more than its beginning."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from palimpsest.attention.phrases import gains, phrase_columns, windows
from palimpsest.demo import scenes
from palimpsest.host.branch.blocks import parse_blocks
from palimpsest.host.quote import quoted
from palimpsest.nodes import files
from palimpsest.nodes.prompt import BatchPromptEdits
from test_alignment import edit_of

LONG = "x\ny" * 1500
EDIT = edit_of("a cat", ["a dog"])

QUOTING: dict[str, Callable[[], object]] = {
    "reweight": lambda: gains(f"{LONG}:2", EDIT),
    "reweight, no colon": lambda: gains(LONG, EDIT),
    "reweight, no number": lambda: gains(f"cat:{LONG}", EDIT),
    "word_schedule": lambda: windows(f"{LONG}:0-1-2", EDIT, 0.0, 1.0),
    "words": lambda: phrase_columns([LONG], EDIT, "Local Blend"),
    "the prompts' words": lambda: phrase_columns(
        ["moon"], edit_of(" ".join(map(str, range(3000))), ["a dog"]), "Local Blend"
    ),
    "blocks": lambda: parse_blocks(LONG, [("output", 4)], "feature_blocks"),
    "a range of blocks": lambda: parse_blocks("output 0-" + "9" * 3000, [("output", 4)], "feature_blocks"),
    "file": lambda: files.existing(LONG, "Load Trajectory"),
    "caption": lambda: scenes.parse("x" * 3000, 0),
    "caption, its end": lambda: scenes.parse(f"a photo of a red cat in a room {'x' * 3000}", 0),
    "source prompts": lambda: BatchPromptEdits.execute(
        {"one": edit_of("cat " * 900, ["a dog"]), "other": edit_of("dog " * 800, ["a dog"])}
    ),
}


@pytest.mark.parametrize("case", QUOTING)
def test_sentences_are_short_and_on_one_line(case: str) -> None:
    with pytest.raises(ValueError, match="…") as caught:
        QUOTING[case]()
    sentence = str(caught.value)
    assert len(sentence) < 700
    assert "\n" not in sentence


def test_short_text_is_quoted_whole() -> None:
    assert quoted(" red \n cat") == "'red cat'"
    assert quoted("x" * 60) == f"'{'x' * 60}'"
    assert quoted("x" * 61) == f"'{'x' * 60}…'"
