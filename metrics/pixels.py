"""How far two pictures are apart, pixel by pixel: MSE, PSNR and SSIM. Pure torch, in float64.

SSIM is that of Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment" (2004), equation 13, with their Gaussian
window of 11 pixels and sigma 1.5, averaged over channels and over the windows that lie within the picture.

Pictures are [b, h, w, c] in 0..1. `where` [b, h, w], 1 where a pixel counts and 0 where it does not, restricts a value
to these pixels: no other pixel has any influence on it. A picture without such pixels has the value NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def mean(values: Tensor, where: Tensor | None = None) -> Tensor:
    """[b]: the mean of values [b, h, w] where they count."""
    return values.mean((1, 2)) if where is None else (values * where).sum((1, 2)) / where.sum((1, 2))


def mse(one: Tensor, other: Tensor, where: Tensor | None = None) -> Tensor:
    """[b]"""
    return mean(((one.double() - other.double()) ** 2).mean(-1), where)


def psnr(one: Tensor, other: Tensor, where: Tensor | None = None) -> Tensor:
    """[b] decibels; infinite where both are the same."""
    return -10 * mse(one, other, where).log10()


def ssim(one: Tensor, other: Tensor, where: Tensor | None = None) -> Tensor:
    """[b]: with `where`, windows hold its pixels alone, and those around its pixels are averaged."""
    one, other = (picture.double().movedim(-1, 1) for picture in (one, other))
    counts = torch.ones_like(one[:, 0]) if where is None else where.double()
    weight = counts[:, None]
    total = _windows(weight).clamp_min(torch.finfo(weight.dtype).tiny)

    def local(values: Tensor) -> Tensor:
        return _windows(weight * values) / total

    mean_one, mean_other = local(one), local(other)
    variance_one, variance_other = local(one**2) - mean_one**2, local(other**2) - mean_other**2
    covariance = local(one * other) - mean_one * mean_other
    luminance = (2 * mean_one * mean_other + C1) / (mean_one**2 + mean_other**2 + C1)
    structure = (2 * covariance + C2) / (variance_one + variance_other + C2)
    margin = WINDOW // 2
    return mean((luminance * structure).mean(1), counts[:, margin:-margin, margin:-margin])


def _windows(values: Tensor) -> Tensor:
    """[b, c, h, w] to the Gaussian means around all pixels whose window lies within the picture."""
    along = torch.exp(-((torch.arange(WINDOW, device=values.device) - WINDOW // 2) ** 2) / (2 * SIGMA**2)).to(values)
    along = along / along.sum()
    channels = values.shape[1]
    for kernel in (along[:, None], along[None]):
        values = conv2d(values, kernel.expand(channels, 1, *kernel.shape), groups=channels)
    return values
