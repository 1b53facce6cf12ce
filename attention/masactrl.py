"""MasaCtrl (arXiv 2304.08465): mutual self-attention, the target's queries on the source's keys and values. Pure torch.

Section 3.2, equation 6: from step S and attention layer L on, softmax(Q_target K_source^T) V_source in place of the
target's self-attention. Section 3.3, equations 7 to 9: with masks of the foreground in both images, the foreground
attends to the source's foreground and the background to its background. The union variant of the public code attends
to both images' keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..host.layer import Block, Inputs, Layer, Part, Read


@dataclass(frozen=True)
class MasaCtrl:
    """layers: (block, index) of the self-attention layers to replace. start: fraction of the schedule of step S.

    union: keys of both images. masks: of the foreground in source and target, [h, w] in 0..1 each, or None.
    """

    layers: frozenset[tuple[Block, int]]
    start: float
    union: bool
    masks: tuple[Tensor, Tensor] | None

    def check(self, positive: Tensor, batch: int) -> None:
        """Any target will do: the method knows no words."""

    def at(self, fraction: float) -> MasaCtrl | None:
        return self if fraction >= self.start else None

    node = "MasaCtrl"
    everyone = True
    reads = ("key", "value")
    features = ()

    def wants(self, layer: Layer) -> bool:
        return layer.kind == "self" and (layer.block_id, layer.index) in self.layers

    def read(self, layer: Layer, source: Inputs, target: Inputs) -> tuple[Read, ...]:
        key, value = source.key, source.value
        if self.masks is None:
            if self.union:
                key, value = torch.cat([key, target.key], 1), torch.cat([value, target.value], 1)
            return (Read(Inputs(target.query, key, value)),)
        read = Read(Inputs(target.query, key, value))
        foreground, wanted = (_resized(mask, layer) for mask in self.masks)
        foreground = foreground > 0.5
        if foreground.all() or not foreground.any():  # the source has nothing to keep apart here
            return (read,)
        parts = tuple(
            Part(keys.nonzero().flatten().to(key.device), weight[:, None].to(key))
            for keys, weight in ((foreground, wanted), (~foreground, 1 - wanted))
            if weight.any()
        )
        return (read._replace(parts=parts),)


def _resized(mask: Tensor, layer: Layer) -> Tensor:
    """[positions]"""
    return interpolate(mask[None, None], (layer.height, layer.width), mode="area").flatten()
