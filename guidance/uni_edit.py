"""Uni-Edit's guidance by position (UniEdit-Flow, arXiv 2504.13109): more of it where two prompts differ more.

m is the mean over channels of how far the two velocities are apart, stretched over each image from 0 to 1. A step is
taken with m v_target + (1 - m) v_source, the "fusion", and omega (1 + m) (v_target - v_source), the "correction". That
is guidance of omega + m (1 + omega) from the source's prompt as the negative one. Denoised estimates differ as the
velocities do, times -sigma, so that m is the same, and models that predict noise or v are guided so too. Pure torch.

The authors' code for Flux takes m of tokens, 2 x 2 positions, and that for diffusers of the differences with their
sign; here it is of the positions of the latent, and without sign.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NODE = "UniEdit Guidance"


class UniEdit(NamedTuple):
    """amount: how much of m counts, from 0, plain guidance, to 1, Uni-Edit. The run's cfg is omega."""

    amount: float

    node = NODE
    needs_negative = True

    def guided(self, difference: Tensor, cfg: float) -> Tensor:
        """What is multiplied by cfg, from the difference of the two denoised estimates [b, c, (t,) h, w]."""
        if cfg == 0:
            raise ValueError(
                f"{NODE} is a multiple of the sampler's guidance, but that is 0: raise cfg, to 5 as in the paper."
            )
        return difference * (1 + self.amount * apart(difference) * (1 + cfg) / cfg)


def apart(difference: Tensor) -> Tensor:
    """[b, 1, (t,) h, w]: m, 0 where the two are least apart in an image and 1 where most; 0 where there is no such."""
    size = difference.abs().mean(1, keepdim=True)
    least, most = (size.flatten(1).aminmax(dim=1)[i].view(-1, *[1] * (size.ndim - 1)) for i in (0, 1))
    return (size - least) / (most - least).clamp_min(1e-12)
