"""Scores pictures against captions: reads a scene back from its pixels, and compares.

Reading is analysis by synthesis on the renderer's own palette, grounds and shapes: find the ground, then how much of
every pixel is not ground, then the outlines that explain those pixels best. Pure numpy and scipy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import fft

from . import scenes
from .scenes import SIZE

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
_RADII = np.geomspace(5.4, 23, 16)  # pixels, from just below the smallest thing to just above the largest
_LEAST_EVIDENCE = 20  # matte pixels that an outline must explain to be a thing; the smallest things explain about 40


@dataclass(frozen=True)
class Found:
    """One thing read from a picture: its words, and its centre and radius in pixels."""

    size: str
    color: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows. `things`, left first or top first, are no more than asked for; `count` may be one more."""

    background: str
    texture: str
    things: tuple[Found, ...]
    count: int

    @property
    def relation(self) -> str:
        """How the first of two things lies to the second ("" unless there are two)."""
        if len(self.things) != 2:
            return ""
        first, second = self.things
        return "next to" if abs(first.x - second.x) > abs(first.y - second.y) else "above"


def read(image: np.ndarray, things: int) -> Reading:
    """The scene of a [64, 64, 3] picture in [0, 1] that should show `things` things (one or two).

    `things` decides what counts as small or large, and the most that are described. Soft, noisy and slightly
    miscoloured pictures are fine.
    """
    image = np.asarray(image, np.float32)
    background, texture, ground = _read_ground(image)
    colors = [color for color in scenes.COLORS if color != background]
    matte = _matte(image, ground, colors)
    guesses = _pursue(matte, things + 1)
    outlines = [ranked[0] for ranked in guesses[:things]]
    for index, ranked in enumerate(guesses[:things]):
        others = outlines[:index] + outlines[index + 1 :]
        outlines[index] = _best_fit(matte, ranked[:3], others)
    outlines.sort(key=lambda outline: outline.x + outline.y)  # left first or top first, whichever way they lie apart
    found = tuple(_describe(image, outline, colors, things) for outline in outlines)
    return Reading(background, texture, found, len(guesses))


def judge(image: np.ndarray, scene: scenes.Scene) -> dict[str, bool]:
    """Whether a [64, 64, 3] picture in [0, 1] shows `scene`, word kind by word kind and in all.

    Colours, shapes and sizes must be right for every thing, in the order left to right or top to bottom.
    """
    reading = read(image, len(scene.things))

    def agree(word: str) -> bool:
        return [getattr(thing, word) for thing in reading.things] == [getattr(thing, word) for thing in scene.things]

    verdict = {
        "background": reading.background == scene.background,
        "texture": reading.texture == scene.texture,
        "count": reading.count == len(scene.things),
        "color": agree("color"),
        "shape": agree("shape"),
        "size": agree("size"),
        "relation": reading.relation == scene.relation,
    }
    return verdict | {"all": all(verdict.values())}


@dataclass(frozen=True)
class _Outline:
    """A shape with its centre and radius in pixels."""

    shape: str
    x: float
    y: float
    radius: float

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Signed distance in pixels, negative inside."""
        return scenes.distance(self.shape, x - self.x, y - self.y, self.radius)

    def moved(self, dx: float, dy: float, grown: float) -> _Outline:
        """The outline shifted and grown by some pixels, kept within the picture and the known radii."""
        x, y = np.clip((self.x + dx, self.y + dy), 0, SIZE)
        return _Outline(self.shape, float(x), float(y), float(np.clip(self.radius + grown, _RADII[0], _RADII[-1])))


class _Empty(scenes.Scene):
    """A ground without things, hence without a layout."""

    def circles(self) -> list[tuple[float, float, float]]:
        return []


@cache
def _grounds() -> tuple[list[tuple[str, str]], np.ndarray]:
    """Background and texture words of the 21 grounds, and their [21, 64, 64, 3] pictures."""
    words = [(background, texture) for background in scenes.BACKGROUNDS for texture in scenes.TEXTURES]
    return words, np.stack([scenes.render(_Empty((), "", texture, background)) for background, texture in words])


def _read_ground(image: np.ndarray) -> tuple[str, str, np.ndarray]:
    """Background and texture words, and the ground's own [64, 64, 3] picture."""
    words, pictures = _grounds()
    misfit = np.minimum(np.abs(image - pictures).mean(-1), 0.15)  # capped, so that things weigh little
    best = int(misfit.mean((1, 2)).argmin())
    return *words[best], pictures[best]


def _paints(colors: Sequence[str]) -> np.ndarray:
    """[colors, 6, 3]: how the colours look when shaded and with or without the glint."""
    flat = np.array([scenes.COLORS[color] for color in colors], np.float32)[:, None] / 255
    shades = np.array([0.88, 0.97, 1.05], np.float32)[:, None]
    return np.clip(np.concatenate((flat * shades, flat * shades + 0.13), 1), 0, 1)


def _matte(image: np.ndarray, ground: np.ndarray, colors: Sequence[str]) -> np.ndarray:
    """[64, 64]: 0 where a pixel looks like the ground, lit or in shadow, 1 where it looks like one of the colours."""
    light = np.clip((image * ground).sum(-1) / (ground**2).sum(-1), 0.68, 1.02)
    from_ground = ((image - light[..., None] * ground) ** 2).sum(-1)
    paints = _paints(colors).reshape(-1, 3)
    from_paint = ((image**2).sum(-1)[..., None] - 2 * image @ paints.T + (paints**2).sum(-1)).min(-1).clip(0)
    return from_ground / (from_ground + from_paint + 1e-6)


def _halved(matte: np.ndarray) -> np.ndarray:
    """[..., 64, 64] to [..., 32, 32], by the mean."""
    return matte.reshape(*matte.shape[:-2], SIZE // 2, 2, SIZE // 2, 2).mean((-3, -1))


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Conjugate spectra [shapes, radii, 32, 17] and energies [shapes, radii, 1, 1] of all outlines, at half size."""
    middle = SIZE / 2
    distances = [[_Outline(s, middle, middle, r).distance(_X, _Y) for r in _RADII] for s in scenes.SHAPES]
    covers = _halved(np.clip(0.5 - np.array(distances, np.float32), 0, 1))
    spectra = fft.rfft2(fft.ifftshift(covers, axes=(-2, -1)))
    return spectra.conj(), (covers**2).sum((-2, -1), keepdims=True)


def _pursue(matte: np.ndarray, most: int) -> list[list[_Outline]]:
    """Up to `most` things in a [64, 64] matte, plainest first; each as one rough outline a shape, best first.

    Repeatedly takes the template that explains the most of the matte (its fall in squared error), and wipes it out.
    """
    spectra, energies = _templates()
    things: list[list[_Outline]] = []
    for _ in range(most):
        half = _halved(matte)
        gains = 4 * (2 * fft.irfft2(spectra * fft.rfft2(half), s=half.shape) - energies)
        shape, _, row, column = np.unravel_index(gains.argmax(), gains.shape)
        if gains.max() < _LEAST_EVIDENCE:
            break
        top, left = max(0, row - 3), max(0, column - 3)
        near = gains[:, :, top : row + 4, left : column + 4]
        ranked = []
        for kind in np.argsort(-near.max((1, 2, 3))):
            size, down, across = np.unravel_index(near[kind].argmax(), near[kind].shape)
            ranked.append(_Outline(scenes.SHAPES[kind], 2.0 * (left + across), 2.0 * (top + down), float(_RADII[size])))
        things.append(ranked)
        matte = matte * (ranked[0].distance(_X, _Y) > 2)
    return things


def _best_fit(matte: np.ndarray, starts: Sequence[_Outline], others: Sequence[_Outline]) -> _Outline:
    """The one of some rough outlines that fits the [64, 64] matte best once moved and resized; ignores `others`."""
    reach = 1.2 * starts[0].radius + 5
    window = tuple(slice(max(0, int(at - reach)), int(at + reach)) for at in (starts[0].y, starts[0].x))
    x, y, matte = _X[window], _Y[window], matte[window]
    weight = np.ones_like(matte)
    for other in others:
        weight *= other.distance(x, y) > 1
    return min((_fit(matte, weight, x, y, start) for start in starts), key=lambda fit: fit[0])[1]


def _fit(
    matte: np.ndarray, weight: np.ndarray, x: np.ndarray, y: np.ndarray, outline: _Outline
) -> tuple[float, _Outline]:
    """Gauss-Newton on centre and radius: the squared error left on the weighted pixels, and the outline there."""
    soft = 1.5  # pixels over which the edge fades: the pictures are a bit soft, and a wider edge pulls from further
    for _ in range(5):
        distance = outline.distance(x, y)
        error = matte - np.clip(0.5 - distance / soft, 0, 1)
        down, across = np.gradient(distance)
        # distance(x, y, r) is homogeneous of degree one, which gives its slope along the radius
        along_radius = (distance - (x - outline.x) * across - (y - outline.y) * down) / outline.radius
        edge = (np.abs(distance) < 0.5 * soft + 0.7) * weight / soft
        slopes = (np.stack((across, down, -along_radius)) * edge).reshape(3, -1)
        step = np.linalg.solve(slopes @ slopes.T + 0.5 * np.eye(3), slopes @ error.ravel())
        outline = outline.moved(*np.clip(step, -1.5, 1.5))
    error = matte - np.clip(0.5 - outline.distance(x, y) / soft, 0, 1)
    return float((weight * error**2).sum()), outline


def _describe(image: np.ndarray, outline: _Outline, colors: Sequence[str], things: int) -> Found:
    """The words for an outline, with the colour of the pixels well inside it."""
    inside = image[outline.distance(_X, _Y) < -1]
    misfit = ((inside[:, None, None] - _paints(colors)) ** 2).sum(-1).min(-1).mean(0)
    bounds = scenes.RADII_ALONE if things == 1 else scenes.RADII_PAIR
    size = min(bounds, key=lambda size: max(bounds[size][0] - outline.radius, outline.radius - bounds[size][1]))
    return Found(size, colors[misfit.argmin()], outline.shape, outline.x, outline.y, outline.radius)
