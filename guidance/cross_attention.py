"""Cross-attention guidance of pix2pix-zero (arXiv 2302.03027, section 3.3): keeps a layout by a gradient.

Before a step the latent goes down the gradient of L = ||A - A_ref||^2, where A are the cross-attention maps of the new
prompt at this latent, and A_ref those of the source prompt at the source's own. Pure torch.

As in the public code, L is a sum over layers, positions and tokens and a mean over heads, and the step is taken in
z = x / sqrt(1 + sigma^2). That code averages over the negative's row too, which halves the gradient: its amount of 0.1
is 0.05 here.

It also has two latents: the positive prompt is run at one that its own maps have moved, and the negative at one that
its maps have moved, which is the one that the sampler goes on with. In the paper there is one latent.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..host.layer import Layer


@dataclass(frozen=True)
class CrossAttentionGuidance:
    """amount: the step's length. end: until where in the run. max_side: the largest layers that count, in positions.

    two_latents: the public code's form, not the paper's.
    """

    amount: float
    end: float
    max_side: int
    two_latents: bool = False

    def applies(self, fraction: float) -> bool:
        return fraction < self.end

    def wants(self, layer: Layer) -> bool:
        return max(layer.height, layer.width) <= self.max_side

    def loss(self, maps: Tensor, reference: Tensor) -> Tensor:
        """One layer's part of the loss, [b], from maps [b, heads, positions, tokens]. Images never share a part."""
        return (maps - reference).square().sum((2, 3)).mean(1)

    def moved(self, x: Tensor, gradient: Tensor, sigma: float) -> Tensor:
        """x after a step against dL/dx: z - amount dL/dz, as x."""
        return x - self.amount * (1 + sigma**2) * gradient
