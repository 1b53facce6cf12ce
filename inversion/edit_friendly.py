"""Edit-friendly DDPM inversion (arXiv 2304.06140, algorithm 1): the noise that a stochastic sampler would have drawn.

Each state is the image under noise of its own, z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) n_t with all n_t independent. The
sampler's step z' = mu(z) + s n then asks for the noise map n that leads from one to the next, of which s n is kept;
replayed, the maps give the image back whatever the guidance, and with another prompt an edit of it. Unlike the authors'
code, s^2 = eta^2 times the posterior's variance in mu as well, and the last map is kept. Sampler space as in ddim.py.
Pure torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Posterior(NamedTuple):
    """Where a step leads but for its noise map, [b, c, h, w], and the denoised estimate."""

    mean: Tensor
    denoised: Tensor


def independent_states(image: Tensor, sigmas: Tensor, seed: int) -> list[Tensor]:
    """The image [b, c, h, w] under independent noise at each of the falling sigmas; at the last it is as it is.

    Drawn from the clean end up, so that states do not depend on where the schedule begins, and once for all images.
    """
    generator = torch.Generator().manual_seed(seed)
    states = [image]
    for sigma in sigmas.flip(0)[1:].tolist():
        states.append(image + sigma * torch.randn((1, *image.shape[1:]), generator=generator).to(image))
    return states[::-1]


def posterior(
    x: Tensor, sigma: float, sigma_next: float, denoise: Callable[[Tensor, float], Tensor], eta: float
) -> Posterior:
    """The step of DDPM (eta 1), or of DDIM with that much noise, down from `sigma`."""
    denoised = denoise(x, sigma)
    spread = eta * sigma_next * (1 - (sigma_next / sigma) ** 2) ** 0.5
    mean = denoised + (sigma_next**2 - spread**2) ** 0.5 / sigma * (x - denoised)
    return Posterior(mean, denoised)
