"""The controlled reverse ODE of RF-Inversion (arXiv 2410.10792): while its window lasts, sampling is drawn to an image.

There the velocity is v + eta (v_image - v), where v_image leads from the state x at sigma straight to the image x_0.
As v = (x - D) / sigma and v_image = (x - x_0) / sigma, that is the velocity of the denoised estimate D + eta (x_0 - D),
a mixture that means the same for models that predict noise or v, and under any sampler. Pure torch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ImagePull(NamedTuple):
    """eta: how far the estimate goes to the image, 0 to 1. start, end: the fractions of the run between which it does.

    decay: whether eta falls over the run in a line, to 0 at its end.
    """

    eta: float
    start: float
    end: float
    decay: bool

    def at(self, fraction: float) -> float:
        """eta of the step that starts where `fraction` (0 to 1) of the schedule is finished."""
        if not self.start <= fraction < self.end:
            return 0.0
        return self.eta * (1 - fraction) if self.decay else self.eta

    def pulled(self, denoised: Tensor, image: Tensor, fraction: float) -> Tensor:
        """The estimate to go on with: exactly `denoised` where nothing pulls, exactly `image` at eta 1."""
        eta = self.at(fraction)
        return (1 - eta) * denoised + eta * image if eta else denoised
