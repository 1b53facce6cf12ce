"""The things of demo scenes, drawn facing left: each a few strokes of the pen in one main colour."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from .drawing import COLORS, DARK, LIGHT, MATERIALS, Color, Pen, Point, finish, mix

GLASS: Color = (186, 222, 245)
GLOW: Color = (255, 236, 130)
BARK: Color = (122, 82, 52)
LEAF: Color = (66, 150, 70)
CREAM: Color = (250, 240, 214)
BEAK: Color = (246, 150, 36)
ROSE: Color = (240, 150, 160)
HAT: Color = (44, 60, 150)
PLAIN: Color = (205, 205, 205)  # what a material is laid over

POSES = ("sitting", "sleeping")
_HELD = ("with a hat", "with a balloon", "with a ball")


@dataclass(frozen=True)
class Kind:
    """How a thing is drawn, its colour where none is said, and the words it can have besides colour and size.

    `draw(body, extra, color, pose, extras)` draws what is of the thing's own stuff with the first pen.
    """

    draw: Callable[[Pen, Pen, Color, str, str], None]
    natural: Color
    poses: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    faces: bool = False


def _shades(color: Color) -> tuple[Color, Color]:
    """A darker and a lighter one."""
    return mix(color, DARK, 0.3), mix(color, LIGHT, 0.5)


def _eye(p: Pen, x: float, y: float, awake: bool, r: float = 0.075) -> None:
    if awake:
        p.disc(x, y, r * 1.25, LIGHT)
        p.disc(x - r * 0.2, y, r, DARK)
    else:
        p.arc(x, y - 0.03, r * 1.2, r, 0.2, math.pi - 0.2, 0.06, DARK)


def _hold(p: Pen, extra: str, head: Point, width: float) -> None:
    """What an animal or a snowman wears or holds; `head` is the middle of the head's top, `width` the hat's."""
    x, y = head
    if extra == "with a hat":
        p.box(x - width * 0.6, y - 0.46, x + width * 0.6, y, 0.05, HAT)
        p.box(x - width * 0.6, y - 0.17, x + width * 0.6, y - 0.05, 0, (244, 190, 40))
        p.oval(x, y, width, 0.1, HAT)
    elif extra == "with a balloon":
        p.bar(0.6, 0.25, 0.78, -0.65, 0.07, (90, 90, 96))
        p.oval(0.8, -1.02, 0.36, 0.42, (226, 44, 60))
        p.oval(0.68, -1.16, 0.09, 0.13, (255, 170, 175), 0.5)
    elif extra == "with a ball":
        p.disc(-0.84, 0.58, 0.27, (240, 196, 40))
        p.box(-1.1, 0.49, -0.58, 0.67, 0.02, (40, 80, 200))


Head = Callable[[Pen, Color, float, float, bool], None]
Tail = Callable[[Pen, Color, str], None]


def _quadruped(
    p: Pen, over: Pen, c: Color, pose: str, extra: str, head: Head, tail: Tail, coat: Callable[[Pen, Color, str], None]
) -> None:
    dark, _ = _shades(c)
    tail(p, c, pose)
    if pose == "sitting":
        x, y = -0.22, -0.34
        p.bar(-0.02, 0.2, 0.0, 0.76, 0.19, dark)
        p.blob([(-0.36, -0.1), (0.1, -0.2), (0.42, 0.25), (0.56, 0.6), (0.42, 0.85), (-0.1, 0.84), (-0.36, 0.4)], c)
        coat(p, c, pose)
        p.oval(0.26, 0.6, 0.28, 0.26, mix(c, DARK, 0.14))
        p.oval(0.1, 0.79, 0.24, 0.075, c)
        p.bar(-0.26, 0.15, -0.28, 0.76, 0.19, c)
    elif pose == "sleeping":
        x, y = -0.5, 0.42
        p.blob([(-0.66, 0.6), (-0.4, 0.2), (0.15, 0.06), (0.65, 0.25), (0.86, 0.62), (0.7, 0.85), (-0.55, 0.85)], c)
        coat(p, c, pose)
        p.oval(0.48, 0.64, 0.28, 0.21, mix(c, DARK, 0.14))
        p.oval(-0.1, 0.79, 0.28, 0.075, mix(c, DARK, 0.1))
    elif head is _rabbit_head:  # crouching is how a rabbit stands
        x, y = -0.42, -0.04
        p.bar(-0.2, 0.4, -0.24, 0.76, 0.17, dark)
        p.blob([(-0.52, 0.2), (-0.2, -0.08), (0.3, -0.14), (0.7, 0.2), (0.72, 0.66), (0.4, 0.82), (-0.34, 0.7)], c)
        p.oval(0.36, 0.5, 0.34, 0.32, mix(c, DARK, 0.14))
        p.oval(0.2, 0.78, 0.34, 0.08, c)
        p.bar(-0.36, 0.4, -0.42, 0.77, 0.18, c)
    else:
        x, y = -0.46, -0.24
        for at in (-0.16, 0.34):
            p.bar(at, 0.3, at, 0.76, 0.18, dark)
        p.blob([(-0.52, -0.1), (-0.1, -0.14), (0.5, -0.12), (0.68, 0.15), (0.5, 0.44), (-0.1, 0.46), (-0.46, 0.36)], c)
        coat(p, c, pose)
        for at in (-0.36, 0.53):
            p.bar(at, 0.25, at, 0.76, 0.19, c)
    head(p, c, x, y, pose != "sleeping")
    _hold(over, extra, (x + 0.04, y - 0.27), 0.36)


def _bare(p: Pen, c: Color, pose: str) -> None:
    pass


def _stripes(p: Pen, c: Color, pose: str) -> None:
    dark = mix(c, DARK, 0.38)
    x, y = {"sitting": (0.2, 0.12), "sleeping": (0.25, 0.1)}.get(pose, (0.15, -0.1))
    for k in range(3):
        rise = 0.13 * k if pose == "sitting" else 0.04 * k * (pose == "sleeping")
        across = 0.07 * k if pose == "sitting" else 0.19 * k
        p.bar(x + across, y + rise + 0.02, x + across - 0.03, y + rise + 0.15, 0.085, dark)


def _patch(p: Pen, c: Color, pose: str) -> None:
    x, y = {"sitting": (0.16, 0.2), "sleeping": (0.2, 0.34)}.get(pose, (0.25, 0.05))
    p.oval(x, y, 0.22, 0.16, mix(c, DARK, 0.3))


def _cat_head(p: Pen, c: Color, x: float, y: float, awake: bool) -> None:
    dark, light = _shades(c)
    for side in (-1, 1):
        p.poly([(x + side * 0.37, y - 0.02), (x + side * 0.33, y - 0.54), (x + side * 0.02, y - 0.24)], c)
        p.poly([(x + side * 0.29, y - 0.14), (x + side * 0.28, y - 0.41), (x + side * 0.11, y - 0.24)], ROSE)
    p.oval(x, y, 0.4, 0.33, c)
    for at in (-0.12, 0.0, 0.12):
        p.bar(x + at, y - 0.28, x + at * 0.7, y - 0.17, 0.06, dark)
    p.oval(x - 0.04, y + 0.14, 0.22, 0.15, light)
    for at in (-0.2, 0.14):
        _eye(p, x + at, y - 0.04, awake)
    p.poly([(x - 0.11, y + 0.05), (x + 0.03, y + 0.05), (x - 0.04, y + 0.13)], (226, 90, 110))


def _cat_tail(p: Pen, c: Color, pose: str) -> None:
    if pose == "sleeping":
        p.arc(0.55, 0.62, 0.36, 0.2, -0.6, 1.9, 0.15, mix(c, DARK, 0.25))
    elif pose == "sitting":
        p.arc(0.5, 0.4, 0.28, 0.38, -1.3, 1.5, 0.14, c)
    else:
        p.arc(0.52, -0.2, 0.34, 0.36, -0.9, 1.5, 0.14, c)


def _dog_head(p: Pen, c: Color, x: float, y: float, awake: bool) -> None:
    dark, light = mix(c, DARK, 0.42), mix(c, LIGHT, 0.5)
    p.oval(x + 0.03, y - 0.03, 0.34, 0.31, c)
    p.oval(x - 0.3, y + 0.11, 0.3, 0.18, light)
    p.oval(x - 0.55, y + 0.03, 0.11, 0.09, DARK)
    p.arc(x - 0.33, y + 0.1, 0.2, 0.12, 0.3, 2.2, 0.05, DARK)
    _eye(p, x - 0.1, y - 0.1, awake)
    p.blob(
        [
            (x + 0.12, y - 0.3),
            (x + 0.36, y - 0.26),
            (x + 0.44, y + 0.1),
            (x + 0.34, y + 0.36),
            (x + 0.18, y + 0.3),
            (x + 0.12, y),
        ],
        dark,
    )


def _dog_tail(p: Pen, c: Color, pose: str) -> None:
    if pose == "sleeping":
        p.bar(0.7, 0.7, 1.02, 0.77, 0.14, c)
    elif pose == "sitting":
        p.bar(0.4, 0.74, 0.86, 0.62, 0.14, c)
    else:
        p.bar(0.56, 0.0, 0.86, -0.38, 0.15, c)


def _rabbit_head(p: Pen, c: Color, x: float, y: float, awake: bool) -> None:
    for at, turn in ((-0.08, -0.12), (0.2, 0.3)):
        p.oval(x + at * 1.5, y - 0.54, 0.15, 0.44, c, turn)
        p.oval(x + at * 1.5, y - 0.52, 0.07, 0.3, ROSE, turn)
    p.oval(x, y, 0.34, 0.3, c)
    p.oval(x - 0.2, y + 0.1, 0.17, 0.14, mix(c, LIGHT, 0.5))
    _eye(p, x - 0.06, y - 0.05, awake, 0.085)
    p.oval(x - 0.34, y + 0.04, 0.075, 0.06, (226, 90, 110))


def _rabbit_tail(p: Pen, c: Color, pose: str) -> None:
    x, y = {"sitting": (0.58, 0.62), "sleeping": (0.88, 0.5)}.get(pose, (0.8, 0.5))
    p.disc(x, y, 0.2, mix(c, LIGHT, 0.6))


def _sheep_head(p: Pen, c: Color, x: float, y: float, awake: bool) -> None:
    face: Color = (74, 64, 66)
    p.oval(x + 0.22, y + 0.0, 0.2, 0.1, face, 0.5)
    p.oval(x - 0.06, y + 0.08, 0.27, 0.34, face, 0.25)
    for at, rise in ((-0.16, -0.2), (0.04, -0.27), (0.2, -0.17)):
        p.disc(x + at, y + rise, 0.16, c)
    if awake:
        p.disc(x - 0.13, y + 0.06, 0.11, LIGHT)
        p.disc(x - 0.15, y + 0.06, 0.065, DARK)
    else:
        p.arc(x - 0.13, y + 0.03, 0.1, 0.08, 0.2, math.pi - 0.2, 0.06, LIGHT)


def _wool(p: Pen, c: Color, pose: str) -> None:
    x, y, rx, ry = {"sitting": (0.1, 0.34, 0.34, 0.4), "sleeping": (0.12, 0.52, 0.56, 0.26)}.get(
        pose, (0.1, 0.12, 0.5, 0.26)
    )
    for k in range(10):
        a = k * math.pi / 5
        p.disc(x + rx * math.cos(a), y + ry * math.sin(a), 0.2, mix(c, DARK, 0.1 if k % 2 else 0.0))
    p.oval(x, y, rx, ry, c)


def _no_tail(p: Pen, c: Color, pose: str) -> None:
    pass


def _cat(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    _quadruped(p, over, c, pose, extra, _cat_head, _cat_tail, _stripes)


def _dog(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    _quadruped(p, over, c, pose, extra, _dog_head, _dog_tail, _patch)


def _rabbit(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    _quadruped(p, over, c, pose, extra, _rabbit_head, _rabbit_tail, _bare)


def _sheep(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    _quadruped(p, over, c, pose, extra, _sheep_head, _no_tail, _wool)


def _duck(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    for x in (0.0, 0.26):
        p.bar(x, 0.5, x, 0.76, 0.09, BEAK)
        p.oval(x - 0.07, 0.79, 0.16, 0.07, BEAK)
    p.blob([(0.95, -0.16), (0.72, 0.42), (0.15, 0.66), (-0.4, 0.5), (-0.54, 0.1), (-0.1, 0.02), (0.5, 0.1)], c)
    p.bar(-0.36, -0.2, -0.3, 0.25, 0.34, c)
    p.disc(-0.4, -0.34, 0.32, c)
    p.blob([(0.6, 0.08), (0.42, 0.42), (0.0, 0.44), (-0.12, 0.2), (0.2, 0.14)], mix(c, DARK, 0.25))
    p.blob([(-0.62, -0.42), (-1.0, -0.32), (-1.02, -0.2), (-0.64, -0.16)], BEAK)
    _eye(p, -0.46, -0.42, True)
    _hold(over, extra, (-0.36, -0.58), 0.34)


def _fish(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    dark, light = _shades(c)
    p.blob([(0.35, 0.1), (0.9, -0.36), (1.0, -0.2), (0.82, 0.14), (1.0, 0.5), (0.9, 0.62)], dark)
    p.blob([(-0.4, -0.2), (-0.05, -0.64), (0.4, -0.42), (0.4, -0.1)], dark)
    p.blob([(-0.15, 0.5), (0.0, 0.85), (0.34, 0.8), (0.3, 0.45)], dark)
    p.oval(-0.15, 0.13, 0.72, 0.5, c)
    p.oval(-0.2, 0.38, 0.5, 0.2, light)
    p.arc(-0.58, 0.13, 0.36, 0.42, -0.9, 0.9, 0.08, dark)
    p.arc(0.0, 0.13, 0.26, 0.36, -0.9, 0.9, 0.08, dark)
    _eye(p, -0.56, 0.0, True, 0.1)


def _wheel(p: Pen, x: float, y: float, r: float) -> None:
    p.disc(x, y, r, DARK)
    p.disc(x, y, r * 0.5, (190, 190, 196))


def _car(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    pane, light = (over, GLOW) if extra else (p, GLASS)
    p.blob([(-0.42, 0.12), (-0.16, -0.4), (0.62, -0.42), (0.92, 0.12)], c)
    p.poly([(-0.34, 0.1), (-0.1, -0.3), (0.58, -0.31), (0.8, 0.1)], mix(c, DARK, 0.55))
    pane.poly([(-0.22, 0.04), (-0.04, -0.24), (0.2, -0.24), (0.2, 0.04)], light)
    pane.poly([(0.3, 0.04), (0.3, -0.24), (0.54, -0.24), (0.68, 0.04)], light)
    p.box(-0.98, 0.04, 0.98, 0.58, 0.18, c)
    p.box(-0.98, 0.4, 0.98, 0.58, 0.08, mix(c, DARK, 0.35))
    p.oval(-0.88, 0.22, 0.09, 0.1, (255, 240, 170))
    p.box(0.84, 0.14, 0.98, 0.3, 0.03, (190, 30, 40))
    for x in (-0.54, 0.54):
        _wheel(p, x, 0.59, 0.26)


def _bus(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    pane, light = (over, GLOW) if extra else (p, GLASS)
    p.box(-0.66, -0.66, 1.0, 0.64, 0.14, c)
    p.box(-1.04, 0.06, 0.2, 0.64, 0.12, c)
    p.box(-1.04, 0.4, 1.0, 0.64, 0.08, mix(c, DARK, 0.35))
    p.box(-0.62, -0.52, 0.92, 0.06, 0.06, mix(c, DARK, 0.55))
    for x in (-0.55, -0.06, 0.43):
        pane.box(x, -0.45, x + 0.41, 0.0, 0.04, light)
    p.oval(-0.94, 0.26, 0.09, 0.1, (255, 240, 170))
    for x in (-0.54, 0.54):
        _wheel(p, x, 0.62, 0.23)


def _boat(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    p.bar(0.0, -0.85, 0.0, 0.4, 0.08, BARK)
    p.poly([(-0.08, -0.8), (-0.08, 0.26), (-0.8, 0.26)], CREAM)
    p.poly([(0.08, -0.62), (0.08, 0.26), (0.64, 0.26)], mix(CREAM, DARK, 0.12))
    p.poly([(-0.98, 0.36), (0.98, 0.36), (0.66, 0.85), (-0.62, 0.85)], c)
    p.poly([(-0.98, 0.36), (0.98, 0.36), (0.92, 0.48), (-0.9, 0.48)], mix(c, LIGHT, 0.5))


def _rocket(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    dark, light = _shades(c)
    for side in (-1, 1):
        p.blob([(side * 0.2, 0.1), (side * 0.62, 0.5), (side * 0.66, 0.85), (side * 0.24, 0.62)], dark)
    p.blob([(0, -0.98), (0.3, -0.5), (0.36, 0.1), (0.24, 0.7), (-0.24, 0.7), (-0.36, 0.1), (-0.3, -0.5)], c)
    p.blob([(0, -0.99), (0.2, -0.72), (0.29, -0.48), (-0.29, -0.48), (-0.2, -0.72)], dark)
    p.box(-0.2, 0.64, 0.2, 0.82, 0.04, DARK)
    p.disc(0, -0.12, 0.21, light)
    p.disc(0, -0.12, 0.14, (120, 180, 230))


def _pear(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    p.bar(0.0, -0.6, 0.1, -0.92, 0.1, BARK)
    p.blob([(0.1, -0.74), (0.4, -0.96), (0.6, -0.8), (0.36, -0.64)], LEAF)
    p.blob(
        [
            (0, -0.68),
            (0.26, -0.52),
            (0.34, -0.1),
            (0.64, 0.3),
            (0.52, 0.74),
            (0, 0.85),
            (-0.52, 0.74),
            (-0.64, 0.3),
            (-0.34, -0.1),
            (-0.26, -0.52),
        ],
        c,
    )
    p.oval(-0.24, 0.2, 0.1, 0.2, mix(c, LIGHT, 0.55), 0.35)


def _cake(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    dark, light = _shades(c)
    if extra == "with candles":
        for x in (-0.4, 0.0, 0.4):
            over.bar(x, -0.5, x, -0.16, 0.11, (90, 150, 235))
            over.blob([(x, -0.86), (x + 0.1, -0.66), (x, -0.56), (x - 0.1, -0.66)], (255, 190, 40))
    elif extra == "with cherries":
        for x in (-0.44, 0.0, 0.44):
            over.disc(x, -0.28, 0.17, (196, 20, 44))
    p.oval(0, 0.77, 0.98, 0.1, (220, 224, 232))
    p.box(-0.76, 0.0, 0.76, 0.78, 0.08, (238, 206, 150))
    p.box(-0.76, 0.42, 0.76, 0.56, 0.0, dark)
    p.blob(
        [
            (-0.8, 0.0),
            (-0.68, -0.2),
            (0.68, -0.2),
            (0.8, 0.0),
            (0.72, 0.34),
            (0.5, 0.12),
            (0.26, 0.4),
            (0.0, 0.14),
            (-0.28, 0.38),
            (-0.5, 0.12),
            (-0.7, 0.34),
        ],
        c,
    )
    p.oval(0, -0.14, 0.66, 0.07, light)


def _pumpkin(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    dark, _ = _shades(c)
    p.bar(0.0, -0.2, 0.1, -0.5, 0.18, (90, 120, 50))
    p.oval(-0.5, 0.28, 0.44, 0.52, dark)
    p.oval(0.5, 0.28, 0.44, 0.52, dark)
    p.oval(-0.26, 0.28, 0.4, 0.56, mix(c, DARK, 0.1))
    p.oval(0.26, 0.28, 0.4, 0.56, mix(c, DARK, 0.1))
    p.oval(0, 0.28, 0.3, 0.57, c)
    if extra == "with a face":
        for x in (-0.34, 0.34):
            over.poly([(x - 0.18, 0.2), (x + 0.18, 0.2), (x, -0.08)], GLOW)
        over.blob([(-0.52, 0.36), (0.0, 0.5), (0.52, 0.36), (0.26, 0.68), (-0.26, 0.68)], GLOW)


def _cup(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    p.arc(0.54, 0.22, 0.3, 0.3, -1.5, 1.5, 0.15, c)
    p.blob([(-0.7, -0.3), (0.6, -0.3), (0.58, 0.3), (0.44, 0.8), (-0.05, 0.85), (-0.54, 0.8), (-0.68, 0.3)], c)
    p.oval(-0.05, -0.32, 0.68, 0.25, mix(c, LIGHT, 0.4))
    p.oval(-0.05, -0.3, 0.57, 0.18, mix(c, DARK, 0.5))
    if extra:
        drink = {"of coffee": (96, 54, 26), "of milk": (255, 253, 244)}[extra]
        over.oval(-0.05, -0.3, 0.57, 0.18, drink)
        steam: Color = (250, 250, 252)
        if extra == "of coffee":
            for x in (-0.3, 0.2):
                over.blob(
                    [(x - 0.06, -0.46), (x + 0.1, -0.66), (x - 0.04, -0.86), (x + 0.14, -0.7), (x + 0.08, -0.46)], steam
                )


def _teapot(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    dark, light = _shades(c)
    p.arc(0.66, 0.2, 0.3, 0.34, -1.7, 1.7, 0.14, dark)
    p.blob([(-0.4, 0.1), (-0.72, 0.0), (-0.92, -0.36), (-1.08, -0.3), (-0.92, 0.24), (-0.5, 0.6)], dark)
    p.oval(0.06, 0.3, 0.68, 0.52, c)
    p.box(-0.34, 0.72, 0.46, 0.85, 0.05, dark)
    p.oval(0.06, -0.14, 0.4, 0.14, light)
    p.disc(0.06, -0.32, 0.13, c)


def _lamp(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    p.bar(0, -0.1, 0, 0.74, 0.13, (120, 100, 84))
    p.oval(0, 0.76, 0.46, 0.09, (120, 100, 84))
    p.poly([(-0.36, -0.9), (0.36, -0.9), (0.74, 0.06), (-0.74, 0.06)], c)
    p.poly([(-0.7, -0.04), (0.7, -0.04), (0.74, 0.06), (-0.74, 0.06)], mix(c, DARK, 0.35))


def _chair(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    dark, _ = _shades(c)
    for x in (-0.3, 0.36):
        p.bar(x, 0.3, x, 0.72, 0.13, dark)
    p.box(-0.56, -0.92, -0.36, 0.84, 0.05, c)
    p.box(0.38, -0.92, 0.58, 0.84, 0.05, c)
    p.box(-0.56, -0.92, 0.58, -0.66, 0.08, c)
    p.box(-0.5, -0.46, 0.5, -0.24, 0.03, c)
    p.box(-0.68, 0.12, 0.7, 0.36, 0.08, mix(c, LIGHT, 0.25))


def _tree(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    p.poly([(-0.2, 0.85), (-0.12, 0.1), (0.12, 0.1), (0.2, 0.85)], BARK)
    for x, y, r in (
        (-0.42, 0.02, 0.38),
        (0.42, 0.02, 0.38),
        (0, -0.06, 0.44),
        (-0.26, -0.42, 0.38),
        (0.28, -0.42, 0.38),
    ):
        p.disc(x, y, r, mix(c, DARK, 0.12))
    p.disc(0, -0.6, 0.36, c)
    for x, y, r in ((-0.26, -0.4, 0.22), (0.24, -0.3, 0.2), (-0.3, 0.02, 0.2)):
        p.disc(x, y, r, mix(c, LIGHT, 0.16))
    if extra == "with cherries":
        for x, y in ((-0.5, 0.1), (-0.3, -0.34), (0.06, -0.68), (0.0, 0.02), (0.38, -0.36), (0.54, 0.12)):
            over.disc(x, y, 0.13, (206, 20, 44))


def _flower(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    p.bar(0, 0, 0.02, 0.8, 0.12, LEAF)
    p.blob([(0.02, 0.7), (0.3, 0.3), (0.62, 0.3), (0.4, 0.6)], LEAF)
    p.blob([(0.0, 0.78), (-0.3, 0.4), (-0.62, 0.4), (-0.4, 0.7)], LEAF)
    for k in range(6):
        a = k * math.pi / 3 + math.pi / 6
        p.oval(0.38 * math.cos(a), -0.36 + 0.38 * math.sin(a), 0.3, 0.22, mix(c, DARK, 0.1 * (k % 2)), a)
    p.disc(0, -0.36, 0.24, (110, 66, 36))


def _mushroom(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    p.blob([(-0.24, 0.0), (0.24, 0.0), (0.36, 0.76), (0.0, 0.85), (-0.36, 0.76)], CREAM)
    p.blob([(-0.9, 0.14), (-0.66, -0.48), (0.0, -0.8), (0.66, -0.48), (0.9, 0.14), (0.0, 0.26)], c)
    for x, y, r in ((-0.44, -0.16, 0.18), (0.1, -0.48, 0.17), (0.5, -0.08, 0.16)):
        p.oval(x, y, r, r * 0.85, mix(c, LIGHT, 0.85))


def _cactus(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    dark, light = _shades(c)
    p.bar(-0.62, -0.12, -0.62, 0.16, 0.26, c)
    p.bar(-0.62, 0.22, -0.1, 0.26, 0.24, c)
    p.bar(0.62, -0.36, 0.62, 0.0, 0.26, c)
    p.bar(0.62, 0.04, 0.1, 0.08, 0.24, c)
    p.bar(0, -0.62, 0, 0.55, 0.5, c)
    for x in (-0.1, 0.1):
        p.bar(x, -0.6, x, 0.5, 0.06, dark)
    if extra == "with flowers":
        for x, y in ((0, -0.86), (-0.62, -0.3), (0.62, -0.54)):
            over.disc(x, y, 0.17, (250, 120, 180))
            over.disc(x, y, 0.07, (255, 225, 80))
    p.poly([(-0.46, 0.5), (0.46, 0.5), (0.36, 0.85), (-0.36, 0.85)], (176, 88, 56))


def _house(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    p.box(0.36, -0.86, 0.6, -0.2, 0.02, mix(c, DARK, 0.5))
    p.box(-0.72, -0.16, 0.72, 0.85, 0.02, c)
    p.poly([(-0.98, -0.06), (0.0, -0.9), (0.98, -0.06)], mix(c, DARK, 0.45))
    p.box(-0.17, 0.3, 0.17, 0.85, 0.03, mix(c, DARK, 0.6))
    pane, light = (over, GLOW) if extra else (p, GLASS)
    for x in (-0.46, 0.46):
        p.box(x - 0.21, 0.08, x + 0.21, 0.5, 0.02, mix(c, DARK, 0.6))
        pane.box(x - 0.16, 0.13, x + 0.16, 0.45, 0.02, light)


def _castle(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    dark, _ = _shades(c)
    p.box(-0.6, -0.1, 0.6, 0.85, 0.0, c)
    for x in (-0.42, -0.07, 0.28):
        p.box(x, -0.26, x + 0.2, 0.0, 0.0, c)
    for x in (-0.74, 0.74):
        p.box(x - 0.24, -0.46, x + 0.24, 0.85, 0.0, mix(c, DARK, 0.14))
        p.poly([(x - 0.32, -0.42), (x, -0.98), (x + 0.32, -0.42)], mix(c, DARK, 0.5))
    p.box(-0.22, 0.3, 0.22, 0.85, 0.2, DARK)
    pen, window = (over, GLOW) if extra == "with lit windows" else (p, mix(c, DARK, 0.65))
    for x in (-0.74, 0.74):
        pen.box(x - 0.1, -0.22, x + 0.1, 0.14, 0.1, window)
    if extra == "with a flag":
        over.bar(0, -0.1, 0, -1.2, 0.08, BARK)
        over.poly([(0.04, -1.22), (0.62, -1.02), (0.04, -0.78)], (226, 40, 50))


def _tent(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    dark, light = _shades(c)
    p.poly([(0.0, -0.66), (-1.0, 0.85), (1.0, 0.85)], c)
    p.poly([(0.0, -0.66), (-0.5, 0.85), (-0.24, 0.85)], light)
    p.poly([(0.0, -0.66), (0.5, 0.85), (0.24, 0.85)], light)
    p.poly([(0.0, -0.2), (-0.3, 0.85), (0.3, 0.85)], DARK)
    if extra == "with a flag":
        over.bar(0, -0.6, 0, -1.2, 0.08, BARK)
        over.poly([(0.04, -1.22), (0.62, -1.02), (0.04, -0.78)], (226, 40, 50))


def _snowman(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    for side in (-1, 1):
        p.bar(side * 0.28, 0.0, side * 0.76, -0.28, 0.09, BARK)
    p.oval(0, 0.44, 0.56, 0.44, c)
    p.oval(0, -0.06, 0.4, 0.34, c)
    p.disc(0, -0.5, 0.32, c)
    for y in (-0.08, 0.28):
        p.disc(0, y, 0.08, DARK)
    for x in (-0.13, 0.15):
        p.disc(x, -0.58, 0.065, DARK)
    p.poly([(0.02, -0.5), (0.02, -0.36), (-0.46, -0.38)], BEAK)
    _hold(over, extra, (0.0, -0.7), 0.4)


def _ball(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    p.disc(0, 0.1, 0.75, LIGHT)
    for k in range(3):
        turn = k * 2 * math.pi / 3
        fan = [
            (0.75 * math.cos(turn + a * math.pi / 12), 0.1 + 0.75 * math.sin(turn + a * math.pi / 12)) for a in range(6)
        ]
        p.poly([(0.0, 0.1), *fan], c)
        fan = [
            (0.75 * math.cos(turn + a * math.pi / 12), 0.1 + 0.75 * math.sin(turn + a * math.pi / 12))
            for a in range(4, 9)
        ]
        p.poly([(0.0, 0.1), *fan], mix(c, DARK, 0.25))


def _balloon(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    p.bar(0.0, 0.3, 0.0, 0.82, 0.07, (110, 110, 116))
    p.poly([(-0.14, 0.46), (0.14, 0.46), (0, 0.24)], mix(c, DARK, 0.25))
    p.blob(
        [
            (0, -0.98),
            (0.52, -0.72),
            (0.62, -0.28),
            (0.32, 0.2),
            (0, 0.36),
            (-0.32, 0.2),
            (-0.62, -0.28),
            (-0.52, -0.72),
        ],
        c,
    )
    p.oval(-0.26, -0.6, 0.1, 0.2, mix(c, LIGHT, 0.65), 0.5)


def _hat(p: Pen, over: Pen, c: Color, pose: str, extra: str) -> None:
    p.oval(0, 0.66, 0.98, 0.18, c)
    p.poly([(-0.56, -0.42), (0.56, -0.42), (0.5, 0.66), (-0.5, 0.66)], c)
    p.oval(0, -0.42, 0.56, 0.13, mix(c, LIGHT, 0.3))
    p.poly(
        [(-0.515, 0.3), (0.515, 0.3), (0.5, 0.58), (-0.5, 0.58)],
        mix(c, DARK, 0.6) if sum(c) > 300 else mix(c, LIGHT, 0.6),
    )


_LIT = ("with lit windows",)
KINDS: dict[str, Kind] = {
    "cat": Kind(_cat, (238, 146, 52), POSES, _HELD, True),
    "dog": Kind(_dog, (190, 132, 78), POSES, _HELD, True),
    "rabbit": Kind(_rabbit, (214, 200, 188), POSES, _HELD, True),
    "sheep": Kind(_sheep, (236, 220, 188), POSES, _HELD, True),
    "duck": Kind(_duck, (255, 200, 96), (), _HELD, True),
    "fish": Kind(_fish, (250, 130, 60), (), (), True),
    "car": Kind(_car, (232, 112, 48), (), _LIT, True),
    "bus": Kind(_bus, (250, 166, 40), (), _LIT, True),
    "boat": Kind(_boat, (206, 108, 72)),
    "rocket": Kind(_rocket, (170, 190, 224)),
    "pear": Kind(_pear, (186, 204, 66)),
    "cake": Kind(_cake, (250, 206, 190), (), ("with candles", "with cherries")),
    "pumpkin": Kind(_pumpkin, (242, 130, 36), (), ("with a face",)),
    "cup": Kind(_cup, (240, 192, 150), (), ("of coffee", "of milk")),
    "teapot": Kind(_teapot, (96, 150, 200), (), (), True),
    "lamp": Kind(_lamp, (250, 226, 150)),
    "chair": Kind(_chair, (204, 146, 90)),
    "tree": Kind(_tree, (124, 172, 56), (), ("with cherries",)),
    "flower": Kind(_flower, (232, 84, 112)),
    "mushroom": Kind(_mushroom, (204, 112, 72)),
    "cactus": Kind(_cactus, (122, 178, 116), (), ("with flowers",)),
    "house": Kind(_house, (236, 206, 160), (), _LIT),
    "castle": Kind(_castle, (186, 178, 190), (), ("with lit windows", "with a flag")),
    "tent": Kind(_tent, (236, 140, 50), (), ("with a flag",)),
    "snowman": Kind(_snowman, (204, 224, 244), (), _HELD),
    "ball": Kind(_ball, (252, 150, 60)),
    "balloon": Kind(_balloon, (248, 112, 92)),
    "hat": Kind(_hat, (112, 108, 136)),
}


@lru_cache(maxsize=2048)  # 80 kB each
def draw(thing: str, look: str, pose: str, extra: str, mirrored: bool) -> Image.Image:
    """The RGBA drawing of a thing; `look` is a colour, a material or "" for its natural colour."""
    if look in MATERIALS:
        return draw_in(thing, PLAIN, look, pose, extra, mirrored)
    return draw_in(thing, COLORS.get(look, KINDS[thing].natural), "", pose, extra, mirrored)


def draw_in(thing: str, color: Color, material: str, pose: str, extra: str, mirrored: bool) -> Image.Image:
    """The RGBA drawing of a thing in a colour, with a material laid over it or "" for none."""
    body, over = Pen(), Pen()
    KINDS[thing].draw(body, over, color, pose, extra)
    return finish(body, over, material, mirrored)
