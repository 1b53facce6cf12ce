"""The metrics of PIE-Bench (arXiv 2310.01506) as its authors' code computes them, and as they are defined. Pure torch.

The published numbers come from pictures that are black outside of what is measured, and from means over the whole
picture: MSE is multiplied by the measured share f, PSNR gains -10 log10 f, and SSIM counts the black parts as alike.
Structure distance is of values in 0..255 that are normalised as if in 0..1. The pictures' edge counts as edited. The
corrected values look at the measured pixels alone, by the mask as it was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .pixels import WINDOW, mse, psnr, ssim
from .structure import DinoViT, structure_distance

Lpips = Callable[..., Tensor]


def decoded_mask(runs: Sequence[int], height: int, width: int) -> Tensor:
    """[h, w]: 1 where the picture is to be edited, of start, length, start, length ... in rows.

    Raises ValueError for what is no such list.
    """
    if not isinstance(runs, list) or not all(type(number) is int for number in runs):
        raise ValueError("its mask is no list of whole numbers")
    if len(runs) % 2:
        raise ValueError(f"its mask has {len(runs)} numbers, which are no pairs of start and length")
    mask = torch.zeros(height * width)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        if not 0 <= start < len(mask) or length < 0:
            raise ValueError(f"its mask has a run of {length} from {start}, outside of {width} x {height} pixels")
        mask[start : start + length] = 1  # the last runs of the published masks may be too long
    return mask.view(height, width)


def with_edge(mask: Tensor) -> Tensor:
    """[h, w]: the mask that the published numbers are of."""
    return pad(mask[1:-1, 1:-1], (1, 1, 1, 1), value=1)


def published(
    source: Tensor, edited: Tensor, mask: Tensor, lpips: Lpips | None, dino: DinoViT | None
) -> dict[str, float]:
    """Of pictures [1, h, w, 3] in 0..1 and a mask [h, w]. What is not defined is NaN."""
    outside = 1 - with_edge(mask)
    black = [picture * outside[..., None] for picture in (source, edited)]
    mirrored = [_mirrored(picture) for picture in black]
    values = {"psnr": psnr(*black), "mse": mse(*black), "ssim": ssim(*mirrored)}
    if lpips is not None:
        values["lpips"] = lpips(*black)
    found = {name: float(value) if outside.any() else float("nan") for name, value in values.items()}
    if dino is not None:
        found["structure"] = float(structure_distance(dino, source, edited, published=True))
    return found


def corrected(
    source: Tensor, edited: Tensor, mask: Tensor, lpips: Lpips | None, dino: DinoViT | None
) -> dict[str, float]:
    """The same of the pixels outside the mask alone."""
    outside = 1 - mask[None].double()
    metrics = {"psnr": psnr, "mse": mse, "ssim": ssim} | ({} if lpips is None else {"lpips": lpips})
    found = {name: float(metric(source, edited, outside)) for name, metric in metrics.items()}
    if dino is not None:
        found["structure"] = float(structure_distance(dino, source, edited))
    return found


def _mirrored(picture: Tensor) -> Tensor:
    """With windows around every pixel, which see the picture mirrored at its edge."""
    margin = 4 * (WINDOW // 2,)
    return pad(picture.movedim(-1, 1), margin, mode="reflect").movedim(1, -1)
