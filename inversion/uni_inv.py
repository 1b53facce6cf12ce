"""Uni-Inv (arXiv 2504.13109): inversion of flow models with the last step's velocity as a first guess.

The exact inverse of an Euler step is implicit: x' = x + (s' - s) v(x', s') asks for the velocity at the state still to
be found. Uni-Inv takes it at x + (s' - s) v of the step before, which costs nothing: one evaluation a step, and one
more at the first. Models that predict noise or v are inverted so as well, in the host's sampler space, where DDIM's
step is Euler's too. DNAEdit (2506.01430) walks the same way from a first guess drawn as noise. Pure torch.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .ddim import step_up


def velocity(x: Tensor, sigma: float, denoise: Callable[[Tensor, float], Tensor]) -> Tensor:
    """The network's velocity, noise less image, at x [b, c, (t,) h, w] and `sigma`, which is not 0."""
    return (x - denoise(x, sigma)) / sigma


def uni_inv_step(
    x: Tensor,
    sigma: float,
    sigma_next: float,
    denoise: Callable[[Tensor, float], Tensor],
    before: Tensor | None,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step up, from `sigma` to the noisier `sigma_next`: the next x, the denoised estimate and the velocity, as x.

    before: the velocity of the last step, None at the first. Each of the `iterations` takes the velocity anew at the
    state that the one before has led to, as in fixed_point.py.
    """
    v = velocity(x, sigma_next, denoise) if before is None else before
    for _ in range(1 + iterations):
        v = velocity(step_up(x, sigma, sigma_next, v)[0], sigma_next, denoise)
    return *step_up(x, sigma, sigma_next, v), v
