"""The styles of demo scenes: what makes a photo into a pencil drawing or a watercolour. Colours stay recognisable."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

STYLES = ("a photo of", "a pencil drawing of", "a watercolor of")


def styled(style: str, photo: np.ndarray) -> np.ndarray:
    """[128, 128, 3] in [0, 1] of a style, from the picture as a photo."""
    if style == STYLES[1]:
        return _pencil(photo)
    if style == STYLES[2]:
        return _watercolor(photo)
    return photo


def _edges(image: np.ndarray, sigma: float) -> np.ndarray:
    """[128, 128]: how steep the picture is, in any channel."""
    soft = ndimage.gaussian_filter(image, (sigma, sigma, 0), truncate=2.5)
    down, across = np.gradient(soft, axis=(0, 1))
    return np.sqrt((down**2 + across**2).max(-1))


def _pencil(photo: np.ndarray) -> np.ndarray:
    """Coloured pencil on white paper: pale hatched colour between dark outlines."""
    paper = np.array((0.99, 0.98, 0.95), np.float32)
    y, x = np.mgrid[0 : len(photo), 0 : len(photo)].astype(np.float32)
    hatch = 0.68 + 0.08 * np.sin((x + y) * (2 * np.pi / 8))
    line = np.clip(_edges(photo, 0.7) * 4 - 0.25, 0, 0.85)[..., None]
    filled = paper + (photo - paper) * hatch[..., None]
    return filled * (1 - line) + np.array((0.2, 0.2, 0.24), np.float32) * line


def _watercolor(photo: np.ndarray) -> np.ndarray:
    """Wet washes, darker where they dried at their edges, on paper that stays white around the picture."""
    size = len(photo)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    wet = ndimage.gaussian_filter(photo, (0.7, 0.7, 0), truncate=2.5)
    dried = np.clip(_edges(photo, 0.9) * 2.6, 0, 0.45)[..., None]
    pool = 0.5 + 0.25 * np.sin(x / 11 + 1.7 * np.sin(y / 17)) + 0.25 * np.sin(y / 13 + 1.5 * np.sin(x / 15))
    wash = 1 - (1 - wet) * (0.74 + 0.26 * pool)[..., None] - 0.75 * dried * wet
    ragged = 6 + 1.6 * np.sin(0.13 * (x + 1.4 * y)) + 1.2 * np.sin(0.19 * (y - x))
    margin = np.minimum(np.minimum(x, y), size - 1 - np.maximum(x, y)) - ragged
    cover = np.clip(margin / 3, 0, 1)[..., None]
    return 0.98 + (wash - 0.98) * cover
