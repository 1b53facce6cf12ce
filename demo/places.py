"""The places of demo scenes, by day, at sunset and at night."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

SIZE = 128  # pixels a side

PLACES = {
    "meadow": "on a meadow",
    "beach": "on a beach",
    "desert": "in a desert",
    "snow": "in the snow",
    "street": "on a street",
    "room": "in a room",
    "forest": "in a forest",
}
TIMES = ("", "at sunset", "at night")
SHIFTS = 8  # a place is seen from so many spots

Rgb = tuple[float, float, float]
# Light that falls on things and ground; indoors it is that of a lamp.
TINTS: dict[str, Rgb] = {"": (1, 1, 1), "at sunset": (1.0, 0.84, 0.74), "at night": (0.58, 0.64, 0.88)}
TINTS_INDOORS: dict[str, Rgb] = {"": (1, 1, 1), "at sunset": (1.0, 0.84, 0.7), "at night": (0.66, 0.66, 0.84)}

_SKIES: dict[str, tuple[Rgb, Rgb]] = {
    "": ((0.38, 0.66, 0.96), (0.84, 0.93, 1.0)),
    "at sunset": ((0.5, 0.34, 0.62), (1.0, 0.64, 0.36)),
    "at night": ((0.05, 0.07, 0.22), (0.18, 0.22, 0.46)),
}
_GROUNDS: dict[str, tuple[Rgb, Rgb]] = {  # far and near
    "meadow": ((0.58, 0.82, 0.38), (0.36, 0.64, 0.26)),
    "beach": ((0.97, 0.9, 0.68), (0.88, 0.77, 0.52)),
    "desert": ((0.95, 0.72, 0.42), (0.84, 0.52, 0.28)),
    "snow": ((0.96, 0.98, 1.0), (0.82, 0.88, 0.97)),
    "street": ((0.6, 0.6, 0.64), (0.42, 0.42, 0.47)),
    "room": ((0.76, 0.54, 0.36), (0.62, 0.42, 0.27)),
    "forest": ((0.5, 0.6, 0.28), (0.46, 0.46, 0.24)),
}
_Y, _X = (np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5) / SIZE


def tint(place: str, time: str) -> np.ndarray:
    """What the light of a time does to colours."""
    return np.array((TINTS_INDOORS if place == "room" else TINTS)[time], np.float32)


@lru_cache(maxsize=len(PLACES) * len(TIMES) * SHIFTS)
def view(place: str, time: str, shift: int) -> np.ndarray:
    """[128, 128, 3] in [0, 1]: the place without things, seen from one of the `SHIFTS` spots."""
    move = shift / SHIFTS
    image = _room(time, move) if place == "room" else _outdoors(place, time, move)
    image.flags.writeable = False
    return image


def _ramp(colors: tuple[Rgb, Rgb], at: np.ndarray) -> np.ndarray:
    start, stop = (np.array(color, np.float32) for color in colors)
    return start + (stop - start) * np.clip(at, 0, 1)[..., None]


def _over(image: np.ndarray, cover: np.ndarray, color: np.ndarray | Rgb) -> np.ndarray:
    """Paints where `cover`, in picture sides inside the shape, is positive, with a soft edge."""
    share = np.clip(cover * SIZE + 0.5, 0, 1)[..., None]
    return (image * (1 - share) + np.asarray(color, np.float32) * share).astype(np.float32)


def _disc(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    return (1 - np.hypot((_X - x) / rx, (_Y - y) / ry)) * min(rx, ry)


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.minimum(np.minimum(_X - left, right - _X), np.minimum(_Y - top, bottom - _Y))


def _outdoors(place: str, time: str, move: float) -> np.ndarray:
    image = _ramp(_SKIES[time], _Y / 0.56)
    light = tint(place, time)
    wave = np.sin(2 * np.pi * (_X * 0.9 + move))
    horizon = 0.56 + {"meadow": 0.035, "desert": 0.045, "snow": 0.03}.get(place, 0.0) * wave
    if place != "forest":
        image = _sky(image, time, move)
    if place == "meadow":
        far = 0.5 + 0.04 * np.sin(2 * np.pi * (_X * 1.3 - move + 0.3))
        image = _over(image, _Y - far, np.array((0.42, 0.68, 0.5)) * light)
    elif place == "desert":
        for x in (0.24, 0.62):
            x += 0.1 * (move - 0.5)
            image = _over(image, (_Y - 0.3 - 1.1 * np.abs(_X - x)) * 0.7, np.array((0.82, 0.5, 0.3)) * light)
    elif place == "snow":
        for x, top in ((0.12, 0.36), (0.46, 0.31), (0.86, 0.37)):
            slope = (_Y - top - 0.9 * np.abs(_X - x - 0.08 * (move - 0.5))) * 0.74
            image = _over(image, slope, np.array((0.56, 0.62, 0.74)) * light)
            image = _over(image, np.minimum(slope, top + 0.1 - _Y), np.array((0.97, 0.98, 1.0)) * light)
    elif place == "beach":
        sea = _ramp(((0.1, 0.42, 0.7), (0.36, 0.74, 0.82)), (_Y - 0.42) / 0.2) * light
        image = _over(image, _Y - 0.42, sea)
        horizon = 0.6 + 0.014 * np.sin(2 * np.pi * (_X * 1.5 + move))
        image = _over(image, _Y - horizon + 0.02, np.array((0.95, 0.98, 1.0)) * light)
    elif place == "street":
        image = _houses(image, time, light, move)
        horizon = np.full_like(_X, 0.58)
    elif place == "forest":
        image = 0.45 * image + 0.55 * np.array((0.3, 0.6, 0.34), np.float32) * light
        for k in range(5):
            x = 0.06 + 0.22 * k + 0.1 * (move - 0.5) + 0.02 * (k % 2)
            image = _over(image, _box(x - 0.035, -0.1, x + 0.035, 0.6), np.array((0.44, 0.29, 0.18)) * light)
        leaves = 0.16 + 0.035 * np.sin(2 * np.pi * (2.5 * _X + move))
        image = _over(image, leaves - _Y, np.array((0.16, 0.42, 0.2)) * light)
    ground = _ramp(_GROUNDS[place], (_Y - 0.56) / 0.44) * light
    if place == "street":
        ground = _over(ground, np.minimum(0.66 - _Y, 1), np.array((0.74, 0.73, 0.72)) * light)
        dashes = np.abs((_X * 3 + move) % 1 - 0.5) - 0.22
        ground = _over(ground, np.minimum(0.016 - np.abs(_Y - 0.93), dashes / 3), np.array((0.96, 0.95, 0.88)) * light)
    return _over(image, _Y - horizon, ground)


def _sky(image: np.ndarray, time: str, move: float) -> np.ndarray:
    """Sun, clouds, moon and stars."""
    x = 0.84 - 0.06 * move
    if time == "at night":
        for sx, sy in ((0.06, 0.2), (0.17, 0.07), (0.28, 0.27), (0.38, 0.12), (0.5, 0.22), (0.6, 0.06), (0.68, 0.29)):
            image = _over(image, _disc(sx, sy, 0.013, 0.013), (1.0, 1.0, 0.9))
        image = _over(image, _disc(x, 0.15, 0.085, 0.085), (0.97, 0.96, 0.86))
        return _over(image, _disc(x - 0.05, 0.13, 0.07, 0.07), (0.08, 0.1, 0.26))
    if time == "at sunset":
        return _over(image, _disc(0.7 - 0.06 * move, 0.42, 0.12, 0.12), (1.0, 0.88, 0.42))
    image = _over(image, _disc(x, 0.14, 0.085, 0.085), (1.0, 0.92, 0.4))
    for cx, cy in ((0.16 + 0.1 * move, 0.14), (0.5 + 0.1 * move, 0.24)):
        for dx, dy, rx, ry in ((-0.07, 0.012, 0.06, 0.036), (0, -0.01, 0.07, 0.055), (0.08, 0.012, 0.06, 0.038)):
            image = _over(image, _disc(cx + dx, cy + dy, rx, ry), (1.0, 1.0, 1.0))
    return image


def _houses(image: np.ndarray, time: str, light: np.ndarray, move: float) -> np.ndarray:
    fronts = ((0.78, 0.46, 0.4), (0.9, 0.76, 0.52), (0.52, 0.62, 0.74), (0.74, 0.54, 0.6), (0.62, 0.68, 0.5))
    panes = np.array((1.0, 0.86, 0.45)) if time == "at night" else np.array((0.8, 0.9, 0.97)) * light
    for k, front in enumerate(fronts):
        left, top = 0.25 * k - 0.2 * move, (0.2, 0.1, 0.24, 0.14, 0.2)[k]
        image = _over(image, _box(left, top, left + 0.25, 0.7), np.array(front) * light)
        for x in (left + 0.035, left + 0.145):
            for y in np.arange(top + 0.05, 0.45, 0.14):
                image = _over(image, _box(x, y, x + 0.07, y + 0.08), panes)
    return image


def _room(time: str, move: float) -> np.ndarray:
    light = tint("room", time)
    image = _ramp(((0.95, 0.87, 0.74), (0.9, 0.79, 0.64)), _Y / 0.62) * light
    left = 0.62 + 0.08 * (move - 0.5)
    image = _over(image, _box(left - 0.025, 0.06, left + 0.305, 0.44), np.array((1.0, 1.0, 1.0)) * light)
    image = _over(image, _box(left, 0.085, left + 0.28, 0.415), _ramp(_SKIES[time], _Y / 0.45))
    if time:
        image = _over(image, _disc(left + 0.2, 0.18 if time == "at night" else 0.36, 0.05, 0.05), (0.98, 0.93, 0.72))
        image = _over(image, _box(left - 0.02, 0.415, left + 0.3, 0.44), np.array((1.0, 1.0, 1.0)) * light)
    for at in (_X - left - 0.14, _Y - 0.25):
        image = _over(image, np.minimum(0.012 - np.abs(at), _box(left, 0.085, left + 0.28, 0.415)), light)
    image = _over(image, _box(0.1, 0.12, 0.4, 0.38), np.array((0.62, 0.4, 0.24)) * light)  # a picture on the wall
    image = _over(image, _box(0.13, 0.15, 0.37, 0.35), np.array((0.72, 0.86, 0.84)) * light)
    image = _over(image, np.minimum(_box(0.13, 0.15, 0.37, 0.35), _Y - 0.28), np.array((0.5, 0.7, 0.46)) * light)
    floor = _ramp(_GROUNDS["room"], (_Y - 0.62) / 0.38) * light
    floor = floor * (1 - 0.12 * (np.floor((_X - 0.5) / (_Y - 0.2) * 2.6) % 2))[..., None]
    image = _over(image, _Y - 0.6, np.array((0.98, 0.95, 0.88)) * light)
    return _over(image, _Y - 0.635, floor)
