"""InstructPix2Pix's guidance by an image and an instruction (arXiv 2211.09800, equation 3). Pure torch.

    e~ = e(0, 0) + s_I (e(c_I, 0) - e(0, 0)) + s_T (e(c_I, c_T) - e(c_I, 0))

of an image c_I and an instruction c_T. The sampler's own guidance, of scale s_T, is the rest of it where its positive
and its negative are both moved by (s_I - 1) (e(c_I, 0) - e(0, 0)). Denoised estimates differ as predictions do.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NODE = "Instruct Guidance"


class Instruct(NamedTuple):
    """image_scale: s_I. The run's cfg is s_T."""

    image_scale: float

    node = NODE

    def moved(self, estimate: Tensor, shown: Tensor, unshown: Tensor) -> Tensor:
        """An estimate [b, c, h, w] given the image, from those of no instruction with the image and without."""
        return estimate + (self.image_scale - 1) * (shown - unshown)
