"""Proximal guidance (ProxEdit, arXiv 2306.05414): weak differences between two prompts are dropped. Pure torch.

Guidance adds cfg prox(eps(target) - eps(negative)), prox the soft threshold (that of the l1 norm; the public code calls
it l0) at a quantile of the difference. Where nothing is left of the difference the denoised estimate may be pulled
towards the source image, which the paper calls inversion guidance.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import max_pool2d


class Proximal(NamedTuple):
    """quantile: the share of the difference's values that is dropped, 0 to 1.

    pull: how far what is unchanged goes to the source in a step, 0 to 1. start: from which fraction of the run on.
    """

    quantile: float
    pull: float
    start: float

    def shrunk(self, difference: Tensor) -> Tensor:
        """[b, c, h, w], less each image's threshold. Of eps or of denoised estimates, which are proportional."""
        threshold = difference.abs().float().flatten(1).quantile(self.quantile, 1).to(difference)
        return difference.sign() * (difference.abs() - threshold.view(-1, 1, 1, 1)).clamp_min(0)

    def pulls(self, fraction: float) -> bool:
        return self.pull > 0 and fraction >= self.start

    def pulled(self, denoised: Tensor, source: Tensor, shrunk: Tensor) -> Tensor:
        """The guided estimate, pulled to the source where the shrunk difference and its neighbours are 0.

        All [b, c, h, w] in sampler space; source may have one image.
        """
        unchanged = 1 - max_pool2d((shrunk != 0).to(denoised), 3, stride=1, padding=1)
        return denoised + self.pull * unchanged * (source - denoised)
