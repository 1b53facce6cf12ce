"""Local blend (Prompt-to-Prompt, arXiv 2208.01626, section 3.2 "Local editing", and its public code's later form).

After every step the target's latent becomes the source's outside a mask, the union of where the source's and the
target's phrases are attended to: z_target := z_source + mask (z_target - z_source). Pure torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from .alignment import same_prompt
from .heatmap import colored


@dataclass(frozen=True)
class LocalBlend:
    """The mask by words, by hand, or both.

    columns: of the source's and of the target's prompt, [k, source tokens, m] and [k, target tokens, m], 1 at the
    tokens of each phrase; the first `phrases` of the m are where to edit, the others where not to. None for no phrases.
    target: [k, target tokens, channels], the embeddings of the prompts that the columns belong to.
    threshold: of a phrase's map relative to its maximum; subtract_threshold the same for phrases not to edit.
    start: fraction of the schedule before which nothing is blended.
    soft: latent pixels over which the mask by words falls to 0 outside its edge.
    user: [1 or b, h, w] in 0..1 at any resolution, or None. unite: whether it adds to the mask by words or limits it.
    show: gets, with every mask, what draws the phrases' maps that it is made of, [h, w, 3] in 0..1; or None.
    layout: whether the phrases' maps are carried by self-attention, which spreads them enough not to be widened.
    """

    columns: tuple[Tensor, Tensor] | None
    phrases: int
    target: Tensor | None
    threshold: float
    subtract_threshold: float
    start: float
    soft: int
    user: Tensor | None
    unite: bool
    show: Callable[[Callable[[], Tensor]], None] | None = None
    layout: bool = False

    def check(self, positive: Tensor, batch: int) -> None:
        if self.target is not None and not same_prompt(positive, self.target):
            raise ValueError(
                "The sampler's positive is not the target prompt of this Local Blend's words: connect Prompt Edit's "
                "target output."
            )
        if self.target is not None and batch < len(self.target):
            raise ValueError(
                f"Local Blend has {len(self.target)} target prompts but the sampler's latent {batch} image: put Repeat "
                f"Latent Batch with amount {len(self.target)} before latent_image."
            )
        if self.user is not None and len(self.user) not in (1, batch):
            raise ValueError(
                f"Local Blend has {len(self.user)} masks for {batch} images: connect one mask, or one for each image."
            )

    def applies(self, fraction: float) -> bool:
        return fraction > self.start

    def mask(self, source: Tensor | None, target: Tensor | None, size: tuple[int, int]) -> Tensor:
        user = None if self.user is None else interpolate(self.user[:, None], size, mode="area")
        if source is None:
            return user
        if self.show is not None:
            self.show(lambda: heat_picture(torch.cat([maps[0, : self.phrases] for maps in (source, target)])))
        words = self._region(source, target, size, slice(self.phrases), self.threshold, pool=not self.layout)
        if source.shape[1] > self.phrases:
            words &= ~self._region(source, target, size, slice(self.phrases, None), self.subtract_threshold, pool=False)
        words = softened(words.float(), self.soft)
        if user is None:
            return words
        user = user.to(words)
        return torch.maximum(words, user) if self.unite else words * user

    def _region(
        self, source: Tensor, target: Tensor, size: tuple[int, int], which: slice, threshold: float, pool: bool
    ) -> Tensor:
        """[b, 1, *size], True where any of the phrases is attended to in either prompt."""
        either = [phrase_masks(maps[:, which], size, threshold, pool) for maps in (source, target)]
        return (either[0] | either[1]).any(1, keepdim=True)


def heat_picture(maps: Tensor) -> Tensor:
    """[h, w, 3]: maps [n, h, w] in colours, at each position the hottest, each relative to its maximum."""
    heat = maps.float() / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)
    return colored(heat.amax(0, keepdim=True), None)[0]


def phrase_masks(maps: Tensor, size: tuple[int, int], threshold: float, pool: bool) -> Tensor:
    """[b, m, *size], True where a phrase's map [b, m, h, w] exceeds `threshold` of its maximum.

    With `pool` the map is first widened by a 3 x 3 maximum, as for the phrases to edit. A phrase that a prompt does not
    hold has a map of zeros and no region.
    """
    if pool:
        maps = max_pool2d(maps, 3, 1, 1)
    maps = interpolate(maps, size, mode="nearest")
    return maps > threshold * maps.amax((2, 3), keepdim=True)


def softened(mask: Tensor, width: int) -> Tensor:
    """A mask of 0 and 1 that falls to 0 over `width` pixels outside its edge, and stays 1 inside. [b, 1, h, w]"""
    steps = [mask]
    for _ in range(width):
        steps.append(max_pool2d(steps[-1], 3, 1, 1))
    return torch.stack(steps).mean(0)
