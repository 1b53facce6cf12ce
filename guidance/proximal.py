"""Proximal guidance (ProxEdit, arXiv 2306.05414): weak differences between two prompts are dropped. Pure torch.

Guidance adds cfg prox(eps(target) - eps(negative)), prox the soft threshold (that of the l1 norm; the authors' code
calls it l0) at a quantile of the difference. Once it is weak everywhere near a value, the latent that the step led to
may be pulled back there: by inversion guidance to the inversion's own latent of that step, by reconstruction guidance
as far as the denoised estimate is from the source image.

The authors take their quantile over the rows of source and target together, and the source's difference is 0: with one
target, 0.7 and 0.75 there are 0.4 and 0.5 here, where it is each image's own. As there, a value is weak up to twice the
threshold: the mask compares what the soft threshold has left with the threshold once more. Their code with a negative
`recon_t`, for the early steps, gives inversion guidance whether it was asked for or not; there is no such setting here.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import max_pool2d

INVERSION, RECONSTRUCTION = "inversion", "reconstruction"
PULLS = (INVERSION, RECONSTRUCTION)


class Proximal(NamedTuple):
    """quantile: the share of the difference's values that is dropped, 0 to 1.

    pull: how far what is unchanged goes in a step, 0 to 1. start: from which fraction of the run on. towards: one of
    PULLS.
    """

    quantile: float
    pull: float
    start: float
    towards: str

    node = "Proximal Guidance"
    needs_negative = False  # at cfg 1 there is no difference to shrink

    def guided(self, difference: Tensor, cfg: float) -> Tensor:
        """[b, c, h, w], less each image's threshold. Of eps or of denoised estimates, which are proportional."""
        return difference.sign() * (difference.abs() - self._threshold(difference)).clamp_min(0)

    def unchanged(self, difference: Tensor) -> Tensor:
        """[b, c, h, w] 1 where neither the difference nor one next to it exceeds twice the threshold, 0 elsewhere."""
        strong = difference.abs() > 2 * self._threshold(difference)
        return 1 - max_pool2d(strong.to(difference), 3, stride=1, padding=1)

    def pulls(self, fraction: float) -> bool:
        return self.pull > 0 and fraction >= self.start

    def pulled(self, x: Tensor, unchanged: Tensor, denoised: Tensor, state: Tensor, image: Tensor) -> Tensor:
        """x [b, c, h, w] after a step, pulled where it is unchanged.

        denoised: the step's guided estimate. state, image: the source at the step's end and at the run's, of one image
        or b. All in sampler space, where reconstruction guidance of the estimate moves x by as much.
        """
        way = state - x if self.towards == INVERSION else image - denoised
        return x + self.pull * unchanged * way

    def _threshold(self, difference: Tensor) -> Tensor:
        quantiles = difference.abs().float().flatten(1).quantile(self.quantile, 1)
        return quantiles.to(difference).view(-1, 1, 1, 1)
