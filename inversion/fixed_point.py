"""Fixed-point inversion whose last predictions are averaged (ReNoise, arXiv 2403.14602).

The exact inverse of a DDIM step is implicit: x' = x + (sigma' - sigma) eps(x', sigma') asks for the noise of the state
still to be found. DDIM inversion takes eps at x instead; each iteration takes it anew at the estimate of x'. Sampler
space as in ddim.py. Pure torch.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .ddim import first_noise, step_up


def fixed_point_step(
    x: Tensor,
    sigma: float,
    sigma_next: float,
    denoise: Callable[[Tensor, float], Tensor],
    iterations: int,
    average: int,
    regularise: Callable[[Tensor], Tensor] = lambda eps: eps,
) -> tuple[Tensor, Tensor]:
    """One step up, from `sigma` to the noisier `sigma_next`: the next x and the denoised estimate, both as x.

    The step is taken along the mean of the last `average` predictions of the iterations + 1 that there are; each goes
    through `regularise` first. Without iterations it is plain DDIM inversion, to the bit.
    """
    predictions = [regularise(first_noise(x, sigma, sigma_next, denoise))]
    for _ in range(iterations):
        estimate, _ = step_up(x, sigma, sigma_next, predictions[-1])
        predictions.append(regularise((estimate - denoise(estimate, sigma_next)) / sigma_next))
    last = predictions[-average:]
    return step_up(x, sigma, sigma_next, sum(last[1:], last[0]) / len(last))
