"""CLIP guidance as in GLIDE (arXiv 2112.10741, section 2.3): sampling is moved to where a CLIP sees the prompt.

There the mean of each step is moved by s Sigma_t grad_(x_t) (f(x_t) . g(c)), f and g being the embeddings of image and
prompt, of length 1, and their product scaled as the CLIP was trained. That is classifier guidance (arXiv 2105.05233),
which is the same for any sampler as eps - s sqrt(1 - abar) grad_(x_t) log p (equation 14 there).

The host's samplers have x = x_t sqrt(1 + sigma^2), image plus sigma times noise, where sqrt(1 - abar) is
sigma / sqrt(1 + sigma^2) and the denoised estimate D is x - sigma eps. So D moves by

    s sigma^2 / sqrt(1 + sigma^2) grad_(x_t) = s sigma^2 grad_x.

A CLIP that was trained on noise gives the gradient at x_t itself. An ordinary one can only look at D, of which the
gradient with respect to x is dD/dx grad_D: that of images with one and the same variance in every direction, 1 as
latents have it, where dD/dx is 1 / (1 + sigma^2), stands in for it and for a way back through the diffusion model.
Pure torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

SHARPNESS = 100.0  # of log p in products of embeddings: that of GLIDE's CLIP and of most others
Embed = Callable[[Tensor], Tensor]
"""From images [b, c, h, w] to embeddings [b, n]."""


class ClipGuidance(NamedTuple):
    """scale: s. start, end: the fractions of the run between which it guides.

    text: what embeddings of pictures are multiplied by, [1 or b, n]: see `direction`.
    """

    scale: float
    start: float
    end: float
    text: Tensor

    def applies(self, fraction: float) -> bool:
        """At the step that starts where `fraction` (0 to 1) of the schedule is finished."""
        return self.start <= fraction < self.end

    def guided(self, x: Tensor, denoised: Tensor, sigma: float, embed: Embed, noised: bool) -> Tensor:
        """The estimate [b, c, h, w] to go on with at the sampler's latent x. noised: whether `embed` looks at x_t."""
        gradient = self.noised(x, sigma, embed) if noised else self.estimated(denoised, sigma, embed)
        return denoised + self.scale * sigma**2 * gradient

    def noised(self, x: Tensor, sigma: float, embed: Embed) -> Tensor:
        """The gradient with respect to x, where `embed` sees it as x_t."""
        scale = (1 + sigma**2) ** -0.5
        return scale * self._gradient(x * scale, embed)

    def estimated(self, denoised: Tensor, sigma: float, embed: Embed) -> Tensor:
        """The gradient with respect to x, as far as it is known of what `embed` sees in the estimate."""
        return self._gradient(denoised, embed) / (1 + sigma**2)

    def _gradient(self, latent: Tensor, embed: Embed) -> Tensor:
        leaf = latent.clone().requires_grad_()
        products = (normalize(embed(leaf), dim=-1) * self.text.to(leaf.device)).sum(-1)
        return SHARPNESS * torch.autograd.grad(products.sum(), leaf)[0]


def direction(prompt: Tensor, instead_of: Tensor | None = None) -> Tensor:
    """The prompt's embedding [b, n], brought to length 1; less another one's, where a picture is to leave that.

    With two, what both prompts say has no part in the gradient, which is that of the odds of one against the other.
    """
    prompt = normalize(prompt, dim=-1)
    return prompt if instead_of is None else prompt - normalize(instead_of, dim=-1)
