"""O-BELM (arXiv 2410.07273): steps between three states, undone exactly, at one evaluation each.

A step leads from two neighbouring states to the next one, by the noise that the network sees in the nearer; solved for
the other state it is the same step in the other direction. Of all such steps it has the least local error, of third
order. On the way up the distance of the first two states from the path is multiplied by the square of how much longer
the steps become, so they had better grow evenly, as those of karras do. Sampler space as in ddim.py. Pure torch.
"""

from __future__ import annotations

from torch import Tensor


def step(before: Tensor, x: Tensor, eps: Tensor, sigma_before: float, sigma: float, sigma_next: float) -> Tensor:
    """The state [b, c, h, w] at `sigma_next`, from x at `sigma` and the state `before` it at `sigma_before`.

    Up or down: the three sigmas rise or fall. eps: the noise that the network sees in x.
    """
    behind, ahead = sigma_before - sigma, sigma_next - sigma
    ratio = ahead / behind
    return ratio**2 * before + (1 - ratio**2) * x + ratio * (behind - ahead) * eps
