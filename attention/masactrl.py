"""MasaCtrl (arXiv 2304.08465): mutual self-attention, the target's queries on the source's keys and values. Pure torch.

Section 3.2, equation 6: from step S and attention layer L on, softmax(Q_target K_source^T) V_source in place of the
target's self-attention. Section 3.3, equations 7 to 9: with masks of the foreground in both images, the foreground
attends to the source's foreground and the background to its background. The union variant of the public code attends
to both images' keys.

KV-Edit (arXiv 2502.17363): with a mask of where to edit, keys and values outside it are the source's and those inside
the target's own. There what is outside is not run at all; here Local Blend with the same mask puts it back, and what is
inside sees the same, where all layers read so in all steps. The paper has it for flow transformers alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..host.layer import Block, Inputs, Layer, Part, Read

OWN = 0.5  # the share of a position that the mask has to cover


@dataclass(frozen=True)
class MasaCtrl:
    """layers: (block, index) of the self-attention layers to replace. start: fraction of the schedule of step S.

    union: keys of both images. masks: of the foreground in source and target, [h, w] in 0..1 each, or None.
    mask: where keys and values stay the target's own, [1 or b, h, w] in 0..1, or None for nowhere; alone, without union
    or masks. frames: how many stand below each other in a layer, each with the same mask.
    """

    layers: frozenset[tuple[Block, int]]
    start: float
    union: bool
    masks: tuple[Tensor, Tensor] | None
    mask: Tensor | None = None
    frames: int = 1

    def check(self, positive: Tensor, batch: int) -> None:
        """Any target will do, as the method knows no words, but its images have to be as many as the masks."""
        if self.mask is not None and len(self.mask) not in (1, batch):
            raise ValueError(
                f"MasaCtrl has {len(self.mask)} masks for {batch} images: connect one mask, or one for each image."
            )

    def at(self, fraction: float) -> _Rule | None:
        everything_own = self.mask is not None and bool((self.mask > OWN).all())
        return None if fraction < self.start or everything_own else _Rule(self)

    node = "MasaCtrl"


@dataclass(frozen=True)
class _Rule:
    """The edit in one model call. own, parts: what its masks come to, for layers of one size."""

    edit: MasaCtrl
    own: dict[tuple, Tensor] = field(default_factory=dict, compare=False)
    parts: dict[tuple, tuple[Part, ...]] = field(default_factory=dict, compare=False)
    node = MasaCtrl.node
    everyone = True
    reads = ("key", "value")
    features = ()

    def wants(self, layer: Layer) -> bool:
        return layer.kind == "self" and (layer.block_id, layer.index) in self.edit.layers

    def read(self, layer: Layer, source: Inputs, target: Inputs) -> tuple[Read, ...]:
        key, value = source.key, source.value
        place = layer.height, layer.width, key.device, key.dtype
        if self.edit.mask is not None:
            if place not in self.own:
                self.own[place] = _own(self.edit, layer).to(key.device)
            key, value = (_chosen(self.own[place], *each) for each in ((target.key, key), (target.value, value)))
        if self.edit.union:
            key, value = torch.cat([key, target.key], 1), torch.cat([value, target.value], 1)
        read = Read(Inputs(target.query, key, value))
        if self.edit.masks is None:
            return (read,)
        if place not in self.parts:
            self.parts[place] = _parts(self.edit.masks, layer, key)
        return (read._replace(parts=self.parts[place]),)


def _own(edit: MasaCtrl, layer: Layer) -> Tensor:
    """[1 or b, positions], True where the target reads itself."""
    size = layer.height // edit.frames, layer.width
    return (interpolate(edit.mask[:, None], size, mode="area") > OWN).flatten(1).repeat(1, edit.frames)


def _chosen(own: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """[b, positions, ...]: `one` where own [1 or b, positions] is True, `other` elsewhere."""
    return torch.where(own.view(*own.shape, *[1] * (one.ndim - 2)), one, other)


def _parts(masks: tuple[Tensor, Tensor], layer: Layer, key: Tensor) -> tuple[Part, ...]:
    """The attention of foreground to foreground and of background to background, as tensors like `key`."""
    foreground, wanted = (_resized(mask, layer) for mask in masks)
    foreground = foreground > 0.5
    if foreground.all() or not foreground.any():  # the source has nothing to keep apart here
        return ()
    return tuple(
        Part(keys.nonzero().flatten().to(key.device), weight[:, None].to(key))
        for keys, weight in ((foreground, wanted), (~foreground, 1 - wanted))
        if weight.any()
    )


def _resized(mask: Tensor, layer: Layer) -> Tensor:
    """[positions]"""
    return interpolate(mask[None, None], (layer.height, layer.width), mode="area").flatten()
