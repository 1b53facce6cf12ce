"""Pictures side by side with their names above and what was measured below, as people show them to others."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST, LARGEST = 256, 1024  # pixels, of a picture's longer side; others are scaled
GAP = 8
PAPER, INK, QUIET = (255, 255, 255), (25, 25, 25), (110, 110, 110)


def comparison(panels: list[tuple[str, Tensor]], told: str) -> Tensor:
    """[h, w, 3] in 0..1: named pictures [h, w, 3] of one size in a row, and a line of text below."""
    pictures = [_scaled(picture) for _, picture in panels]
    width, height = pictures[0].size
    font = ImageFont.load_default(max(14, width // 20))
    line = round(1.8 * font.size)
    paper = Image.new("RGB", (len(panels) * (width + GAP) + GAP, height + 2 * line), PAPER)
    pen = ImageDraw.Draw(paper)
    for i, ((name, _), picture) in enumerate(zip(panels, pictures, strict=True)):
        x = GAP + i * (width + GAP)
        paper.paste(picture, (x, line))
        pen.text((x + width / 2, line / 2), name, INK, font, "mm")
    pen.text((paper.width / 2, height + 1.5 * line), told, QUIET, font, "mm")
    return torch.from_numpy(np.asarray(paper, np.float32) / 255)


def _scaled(picture: Tensor) -> Image.Image:
    pixels = (picture.clamp(0, 1) * 255).round().byte().cpu().numpy()
    shown, longest = Image.fromarray(pixels), max(pixels.shape[:2])
    if longest < SMALLEST:  # whole pixels, so that the eye judges what was measured
        times = -(-SMALLEST // longest)
        return shown.resize((shown.width * times, shown.height * times), Image.Resampling.NEAREST)
    if longest > LARGEST:
        shown.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return shown
