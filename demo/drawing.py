"""The pen that draws the things of demo scenes, and the paint that makes them look like something.

A drawing stands on y = 0.85 and fills about [-1, 1] in both directions, y downwards; what is worn or held may reach
up to TOP. Everything is drawn large, then scaled down.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Color = tuple[int, int, int]
Point = tuple[float, float]

LEFT, TOP, SPAN = -1.35, -1.7, 2.7  # what a drawing covers
GROUND = 0.85  # where it stands
SIDE = 144  # pixels a side of a finished drawing
_FINE = 3  # how much larger it is drawn

DARK: Color = (34, 30, 38)
LIGHT: Color = (255, 255, 255)

COLORS: dict[str, Color] = {
    "red": (216, 42, 46),
    "yellow": (250, 212, 40),
    "green": (50, 160, 66),
    "blue": (42, 98, 222),
    "turquoise": (60, 205, 200),
    "purple": (132, 60, 184),
    "pink": (244, 138, 186),
    "white": (246, 246, 246),
    "black": (46, 46, 54),
    "brown": (128, 78, 44),
}
MATERIALS = ("wooden", "golden", "stone")


def mix(one: Color, other: Color, share: float) -> Color:
    """`one` with a share of `other`."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


class Pen:
    def __init__(self) -> None:
        self.side = SIDE * _FINE
        self.image = Image.new("RGBA", (self.side, self.side), (*DARK, 0))
        self._draw = ImageDraw.Draw(self.image)

    def poly(self, points: list[Point], fill: Color) -> None:
        scale = self.side / SPAN
        self._draw.polygon([((x - LEFT) * scale, (y - TOP) * scale) for x, y in points], fill=(*fill, 255))

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Color, turn: float = 0.0) -> None:
        c, s = math.cos(turn), math.sin(turn)
        around = [(rx * math.cos(a), ry * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 60, endpoint=False)]
        self.poly([(x + u * c - v * s, y + u * s + v * c) for u, v in around], fill)

    def disc(self, x: float, y: float, radius: float, fill: Color) -> None:
        self.oval(x, y, radius, radius, fill)

    def blob(self, points: list[Point], fill: Color) -> None:
        """A smooth closed curve through the points (Catmull-Rom)."""
        p = np.array(points)
        before, after, beyond = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
        t = np.linspace(0, 1, 10, endpoint=False)[:, None, None]
        curve = 0.5 * (
            2 * p
            + (after - before) * t
            + (2 * before - 5 * p + 4 * after - beyond) * t**2
            + (3 * p - before - 3 * after + beyond) * t**3
        )
        self.poly([tuple(q) for q in curve.transpose(1, 0, 2).reshape(-1, 2)], fill)

    def bar(self, x0: float, y0: float, x1: float, y1: float, width: float, fill: Color) -> None:
        """A thick line with round ends."""
        half, length = width / 2, math.hypot(x1 - x0, y1 - y0) or 1.0
        u, v = -(y1 - y0) / length * half, (x1 - x0) / length * half
        self.poly([(x0 + u, y0 + v), (x1 + u, y1 + v), (x1 - u, y1 - v), (x0 - u, y0 - v)], fill)
        self.disc(x0, y0, half, fill)
        self.disc(x1, y1, half, fill)

    def arc(
        self, x: float, y: float, rx: float, ry: float, start: float, stop: float, width: float, fill: Color
    ) -> None:
        angles = np.linspace(start, stop, 24)
        path = [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]
        for (x0, y0), (x1, y1) in zip(path, path[1:], strict=False):
            self.bar(x0, y0, x1, y1, width, fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, corner: float, fill: Color) -> None:
        scale = self.side / SPAN
        left, top, right, bottom = (v * scale for v in (x0 - LEFT, y0 - TOP, x1 - LEFT, y1 - TOP))
        self._draw.rounded_rectangle((left, top, right, bottom), corner * scale, fill=(*fill, 255))


def finish(body: Pen, extra: Pen, material: str, mirrored: bool) -> Image.Image:
    """The lit RGBA drawing, `SIDE` pixels a side; the material covers the body and not what is worn or held."""
    layers = [_small(pen, mirrored) for pen in (body, extra)]
    rgb, alpha = layers[0]
    lit = _lit(_made_of(material, rgb), alpha)
    if layers[1][1].any():
        over = layers[1][1][..., None]
        lit = lit * (1 - over) + _lit(*layers[1]) * over
        alpha = np.maximum(alpha, layers[1][1])
    picture = np.concatenate((lit, alpha[..., None]), -1)
    return Image.fromarray(np.uint8(picture.clip(0, 1) * 255 + 0.5), "RGBA")


def _small(pen: Pen, mirrored: bool) -> tuple[np.ndarray, np.ndarray]:
    """Colours [side, side, 3] and cover [side, side] in [0, 1]."""
    image = pen.image.resize((SIDE, SIDE), Image.Resampling.BOX)
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = np.asarray(image, np.float32) / 255
    return picture[..., :3], picture[..., 3]


def _lit(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Light from the upper left on the blurred cover, taken for a height, and a dark rim."""
    cover = Image.fromarray(np.uint8(alpha * 255))
    height = np.asarray(cover.filter(ImageFilter.GaussianBlur(7)), np.float32) / 255
    down, across = np.gradient(height)
    light = np.clip((across + 1.4 * down) * 11, -1, 1)[..., None]
    inner = np.asarray(cover.filter(ImageFilter.MinFilter(5)).filter(ImageFilter.BoxBlur(1)), np.float32)[..., None]
    rim = 1 - inner / 255
    rgb = rgb * (1 + 0.3 * np.minimum(light, 0)) + 0.17 * np.maximum(light, 0)
    return rgb * (1 - 0.5 * rim)


_GOLD = np.array([(60, 34, 6), (150, 96, 14), (226, 166, 34), (255, 226, 110), (255, 252, 226)], np.float32) / 255


def _made_of(material: str, rgb: np.ndarray) -> np.ndarray:
    if not material:
        return rgb
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE * SPAN
    gray = rgb.mean(-1)
    if material == "golden":  # polished: broad bright and dark bands of what it mirrors
        shine = 0.5 + 0.5 * np.sin(5.2 * (y * 1.5 - x) + 1.2 * np.sin(3 * x))
        at = np.clip(gray * (0.42 + 0.78 * shine), 0, 1)
        steps = np.linspace(0, 1, len(_GOLD))
        return np.stack([np.interp(at, steps, channel) for channel in _GOLD.T], -1).astype(np.float32)
    if material == "wooden":
        grain = np.sin(21 * y + 2.2 * np.sin(2.4 * x + 1.5 * y))
        return np.array((0.84, 0.58, 0.32), np.float32) * (0.22 + 0.98 * gray * (0.88 + 0.14 * grain))[..., None]
    blotch = np.sin(9 * x + 2.1 * np.sin(7 * y)) + np.sin(10 * y + 2.3 * np.sin(6 * x + 1)) + np.sin(7 * (x + y))
    return np.array((0.66, 0.66, 0.63), np.float32) * (0.1 + gray * (0.94 + 0.3 * np.tanh(1.5 * blotch)))[..., None]
