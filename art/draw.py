"""Draws the registry's icon and banner: a page that has been written over, `python art/draw.py`.

Beneath lies the old writing, scraped off and turned by a quarter as in real palimpsests, with a circle; above it the
new one, with a star in the circle's place.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

FOLDER = Path(__file__).parent
ICON, BANNER = (400, 400), (1680, 720)  # the registry's largest icon; its banners are 21 : 9
FINER = 3  # drawn so many times larger, then reduced

PARCHMENT, SHADE = (240, 226, 196), (204, 178, 132)
OLD_INK, NEW_INK, RED, BLUE = (150, 108, 66), (46, 34, 28), (190, 44, 32), (34, 84, 158)

Point = tuple[float, float]
Circle = tuple[Point, float]


def parchment(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Darker towards the edges, in patches and with a grain."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    edge = np.clip(np.maximum(abs(x), abs(y)), 0, 1) ** 6
    coarse = Image.fromarray(rng.random((9, 9)).astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    dark = 0.55 * edge + 0.4 * np.asarray(coarse) + 0.06 * rng.standard_normal((height, width))
    light, shade = np.array(PARCHMENT), np.array(SHADE)
    colours = light + np.clip(dark, 0, 1)[..., None] * (shade - light)
    return Image.fromarray(colours.clip(0, 255).astype(np.uint8))


def word(x: float, y: float, length: float, size: float, rng: np.random.Generator) -> list[Point]:
    """One stroke of a cursive that cannot be read: loops of changing height, leaning forward."""
    t = np.arange(0, length / size, 0.02)
    height = np.interp(t, np.arange(len(t) // 40 + 2), rng.choice([0.5, 0.6, 1.5], len(t) // 40 + 2))
    up = np.sin(2 * np.pi * t) * height * size * 0.5
    return list(zip(x + t * size + np.cos(2 * np.pi * t) * size * 0.32 + up * 0.35, y - up, strict=True))


def write(draw: ImageDraw.ImageDraw, margin: float, size: float, ink: tuple, seed: int, around: Circle | None) -> None:
    """Fills the page with lines of words; those that would touch the circle are left out."""
    rng = np.random.default_rng(seed)
    width, height = draw.im.size
    for y in np.arange(margin + size / 2, height - margin + size / 2, size * 2.6):
        x = margin
        while (length := size * rng.uniform(2.5, 6)) < width - margin - x:
            stroke = word(x, y, length, size, rng)
            if around is None or min(math.dist(point, around[0]) for point in stroke) > around[1]:
                draw.line(stroke, fill=ink, width=round(size * 0.17), joint="curve")
            x += length + size * 1.6


def layer(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGBA", (width, height))
    return image, ImageDraw.Draw(image)


def star(centre: Point, radius: float) -> list[Point]:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    reach = radius * np.where(np.arange(10) % 2, 0.42, 1)
    return list(zip(centre[0] + reach * np.cos(angles), centre[1] + reach * np.sin(angles), strict=True))


def page(width: int, height: int, centre: Point, radius: float, size: float, seed: int) -> Image.Image:
    """centre, radius: of the circle and of the star over it; size: the height of a letter."""
    image = parchment(width, height, np.random.default_rng(seed)).convert("RGBA")
    margin = size * 2.2

    old, draw = layer(height, width)
    write(draw, margin, size * 1.15, (*OLD_INK, 95), seed + 1, around=None)
    old = old.rotate(90, expand=True)
    draw = ImageDraw.Draw(old)
    x, y = centre
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*RED, 70), outline=(*OLD_INK, 130), width=9)
    image.alpha_composite(old.filter(ImageFilter.GaussianBlur(size * 0.06)))

    new, draw = layer(width, height)
    write(draw, margin, size, (*NEW_INK, 235), seed + 2, around=(centre, radius * 1.15))
    draw.polygon(star(centre, radius * 1.06), fill=(*BLUE, 255))
    image.alpha_composite(new)
    return image


def rounded(image: Image.Image, radius: int) -> Image.Image:
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, image.width - 1, image.height - 1), radius, fill=255)
    image.putalpha(mask)
    return image


def main() -> None:
    width, height = (side * FINER for side in ICON)
    icon = rounded(page(width, height, (width / 2, height / 2), width * 0.29, width * 0.034, seed=4), width // 9)
    icon.resize(ICON, Image.Resampling.LANCZOS).save(FOLDER / "icon.png", optimize=True)

    width, height = (side * FINER for side in BANNER)
    banner = page(width, height, (width * 0.72, height / 2), height * 0.32, height * 0.042, seed=9).convert("RGB")
    banner.resize(BANNER, Image.Resampling.LANCZOS).save(FOLDER / "banner.jpg", quality=85)


if __name__ == "__main__":
    main()
