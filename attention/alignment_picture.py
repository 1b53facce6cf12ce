"""A picture of which source tokens' attention goes to which target tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..host.words import Words, readable
from .alignment import Carry

CELL, SMALLEST_CELL, SIDE = 24, 2, 2000  # pixels; cells shrink where all of them together would be wider than SIDE
GAP = 6
PAPER, INK, FAINT, WORD, SPECIAL = (255, 255, 255), (25, 25, 25), (228, 228, 228), (175, 175, 175), (140, 140, 140)
CARRIED, OWN = (20, 90, 200), (235, 120, 20)
LEGEND = ((CARRIED, "taken from the source token, left"), (OWN, "the target token's own"))


class Line(NamedTuple):
    """A row or a column: the tokens that it sums up, its label, and whether these belong to the word before it."""

    tokens: list[int]
    label: str
    colour: tuple[int, int, int] = INK
    continues: bool = False


def lines(words: Words) -> list[Line]:
    """One for each token of a word, for what stands before them and for each tail."""
    apart = [[token for token in word if token in encoder] for word in words.tokens for encoder in words.encoders]
    begins = {tokens[0] for tokens in apart if tokens}
    found = []
    for head, tail in words.specials:
        inner = range(head.stop, tail.start)
        found += [Line([*head], "start", SPECIAL)] if head else []
        found += [Line([i], readable(words.pieces[i]), continues=i not in begins) for i in inner]
        found += [Line([*tail], "end", SPECIAL)]
    return found


def draw(source: Words, target: Words, carry: Carry) -> Tensor:
    """[1, h, w, 3] in 0..1: source tokens down, target tokens across, and under them the target's own attention."""
    rows, columns = lines(source), lines(target)
    down, across = members(rows, source.length), members(columns, target.length)
    carried = (down / down.sum(1, keepdim=True)) @ carry.source @ across.T
    own = (across @ carry.own / across.sum(1))[None]

    cell = max(SMALLEST_CELL, min(CELL, SIDE // max(len(rows), len(columns))))
    beside = labels(rows, cell, "right")
    above = labels(columns, cell, "left").rotate(90, expand=True)
    under = labels([Line([], "own", OWN)], cell, "right")
    legend = legend_picture()
    x, y = max(beside.width, under.width), above.height
    foot = y + len(rows) * cell + GAP
    width = max(x + len(columns) * cell, legend.width) + GAP + 1
    picture = Image.new("RGB", (width, foot + cell + GAP + 1 + legend.height), PAPER)
    picture.paste(beside, (x - beside.width, y))
    picture.paste(above, (x, 0))
    picture.paste(under, (x - under.width, foot))
    picture.paste(legend, (0, picture.height - legend.height))
    paper = ImageDraw.Draw(picture)
    grid(paper, x, y, cell, carried, CARRIED, rows, columns)
    grid(paper, x, foot, cell, own, OWN, [Line([], "own")], columns)
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]


def members(lines: list[Line], length: int) -> Tensor:
    """[lines, tokens] 1 where the token is one of the line's."""
    found = torch.zeros(len(lines), length)
    for i, line in enumerate(lines):
        found[i, line.tokens] = 1
    return found


def labels(lines: list[Line], cell: int, side: str) -> Image.Image:
    """A label a line, one below the other, written towards this side."""
    font = ImageFont.load_default(1 + 0.6 * cell)
    width = 2 * GAP + round(max(font.getlength(line.label) for line in lines))
    picture = Image.new("RGB", (width, len(lines) * cell), PAPER)
    paper = ImageDraw.Draw(picture)
    x, anchor = (width - GAP, "rm") if side == "right" else (GAP, "lm")
    for i, line in enumerate(lines):
        paper.text((x, (i + 0.5) * cell), line.label, line.colour, font, anchor)
    return picture


def legend_picture() -> Image.Image:
    font = ImageFont.load_default(13)
    picture = Image.new("RGB", (240, 20 * len(LEGEND) + 2 * GAP), PAPER)
    paper = ImageDraw.Draw(picture)
    for i, (colour, text) in enumerate(LEGEND):
        y = GAP + 20 * i
        paper.rectangle((GAP, y + 4, GAP + 11, y + 15), colour)
        paper.text((GAP + 18, y + 10), text, INK, font, "lm")
    return picture


def grid(
    paper: ImageDraw.ImageDraw,
    x: int,
    y: int,
    cell: int,
    amounts: Tensor,
    colour: tuple[int, int, int],
    rows: list[Line],
    columns: list[Line],
) -> None:
    right, bottom = x + len(columns) * cell, y + len(rows) * cell
    for i, j in amounts.nonzero().tolist():
        amount = float(amounts[i, j])
        shade = tuple(round(white + amount * (full - white)) for white, full in zip(PAPER, colour, strict=True))
        paper.rectangle((x + j * cell, y + i * cell, x + (j + 1) * cell, y + (i + 1) * cell), shade)
    for ink in (FAINT, WORD):  # word boundaries over the others
        for i, line in enumerate(rows):
            if line.continues == (ink == FAINT):
                paper.line((x, y + i * cell, right, y + i * cell), ink)
        for j, line in enumerate(columns):
            if line.continues == (ink == FAINT):
                paper.line((x + j * cell, y, x + j * cell, bottom), ink)
    paper.rectangle((x, y, right, bottom), outline=WORD)
