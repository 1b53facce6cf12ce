"""A picture of reconstruction errors along the steps of a run."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 64, 46  # margins
PAPER, INK, FAINT = (255, 255, 255), (25, 25, 25), (228, 228, 228)
COLOURS = (235, 120, 20), (20, 90, 200)
LEAST, MOST = 1e-6, 1e3  # errors drawn
TICKS = 10


def error_plot(curves: dict[str, Tensor]) -> Tensor:
    """[b, h, w, 3] in 0..1: a picture for each image. curves: two, by name, [b, n + 1] from the noise to the image."""
    images = len(next(iter(curves.values())))
    pictures = [_draw({name: values[image].tolist() for name, values in curves.items()}) for image in range(images)]
    return torch.from_numpy(np.stack([np.asarray(picture, np.float32) / 255 for picture in pictures]))


def _draw(curves: dict[str, list[float]]) -> Image.Image:
    """The errors on a logarithmic scale, without the first, which is 0: all runs start at the same noise."""
    drawn = {name: [min(max(v, LEAST), MOST) for v in values[1:]] for name, values in curves.items()}
    steps = len(next(iter(drawn.values())))
    every = [value for values in drawn.values() for value in values]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    high = max(high, low + 1)

    def place(step: int, value: float) -> tuple[float, float]:
        x = LEFT + (step - 1) / max(steps - 1, 1) * (WIDTH - LEFT - RIGHT)
        return x, TOP + (high - math.log10(value)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    picture = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    paper, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for power in range(low, high + 1):
        _, y = place(1, 10.0**power)
        paper.line((LEFT, y, WIDTH - RIGHT, y), FAINT)
        paper.text((LEFT - 8, y), f"{10.0**power:g}", INK, font, "rm")
    for step in range(1, steps + 1, math.ceil(steps / TICKS)):
        x, _ = place(step, 1)
        paper.line((x, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 4), INK)
        paper.text((x, HEIGHT - BOTTOM + 7), str(step), INK, font, "mt")
    paper.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8), "step, from the noise to the image", INK, font, "mb")
    paper.text((LEFT, 8), "distance from the inverted image (root mean square of z)", INK, font, "lt")
    paper.rectangle((LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM), outline=INK)
    x = LEFT
    for (name, values), colour in zip(drawn.items(), COLOURS, strict=True):
        points = [place(step, value) for step, value in enumerate(values, 1)]
        paper.line(points, colour, 2, "curve")
        for px, py in points:
            paper.ellipse((px - 2, py - 2, px + 2, py + 2), colour)
        paper.rectangle((x, 34, x + 11, 45), colour)
        label = f"{name}: {curves[name][-1]:.3g}"
        paper.text((x + 18, 40), label, INK, font, "lm")
        x += 18 + round(font.getlength(label)) + 24
    return picture
