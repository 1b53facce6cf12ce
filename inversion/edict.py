"""EDICT (arXiv 2211.12446): DDIM on a coupled pair, which can be undone exactly.

Each of the two is moved by the noise that the network sees in the other, and both are mixed afterwards; every one of
these operations has an inverse. Which of the two goes first alternates by the step's index in its schedule, in both
directions counted from the noise: any number of steps is exact, odd ones too. In the authors' code, as exact, only the
moves alternate, and it is always x that is mixed first. Sampler space as in ddim.py. Pure torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Noise = Callable[[Tensor, float], Tensor]
"""eps(x, sigma): the noise that the network sees in x [b, c, h, w]."""


class Pair(NamedTuple):
    x: Tensor
    y: Tensor

    def turned(self, index: int) -> Pair:
        """The pair in the order of the step `index`; applied twice, the pair itself."""
        return Pair(self.y, self.x) if index % 2 else self


def step_down(pair: Pair, index: int, sigma: float, sigma_next: float, noise: Noise, mixing: float) -> Pair:
    """One step towards the image, from `sigma` to the cleaner `sigma_next`."""
    first, second = pair.turned(index)
    first = first + (sigma_next - sigma) * noise(second, sigma)
    second = second + (sigma_next - sigma) * noise(first * _rise(sigma, sigma_next), sigma)
    first = mixing * first + (1 - mixing) * second
    second = mixing * second + (1 - mixing) * first
    return Pair(first, second).turned(index)


def step_up(pair: Pair, index: int, sigma: float, sigma_next: float, noise: Noise, mixing: float) -> Pair:
    """Undoes `step_down` of the same arguments."""
    first, second = pair.turned(index)
    second = (second - (1 - mixing) * first) / mixing
    first = (first - (1 - mixing) * second) / mixing
    second = second - (sigma_next - sigma) * noise(first * _rise(sigma, sigma_next), sigma)
    first = first - (sigma_next - sigma) * noise(second, sigma)
    return Pair(first, second).turned(index)


def _rise(sigma: float, sigma_next: float) -> float:
    """What x of `sigma_next` is multiplied by to be the same z at `sigma`: the paper shows the moved z at the old t."""
    return ((1 + sigma**2) / (1 + sigma_next**2)) ** 0.5
