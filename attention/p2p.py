"""Prompt-to-Prompt (arXiv 2208.01626): word swap by attention replacement, without materialising a map. Pure torch.

Section 3.2: while the schedule lasts, the target's cross-attention map is the source's carried over by the alignment,
A_target := A_source M, and its self-attention map is the source's in layers of low resolution. Attention is linear in
its values and the projections have no bias, so (A_source M) V_target is attention of the source's query and key inputs
over the value inputs M @ context_target: only inputs are swapped.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..host.layer import Inputs, Layer
from .alignment import same_prompt


@dataclass(frozen=True)
class Window:
    """A part of the schedule, [start, end) as fractions; empty where end <= start."""

    start: float
    end: float

    def __contains__(self, fraction: float) -> bool:
        return self.start <= fraction < self.end


@dataclass(frozen=True)
class WordSwap:
    """mapper: [source tokens, target tokens], from `alignment.swap_mapper`. self_positions: limit of h * w.

    target: [b, tokens, channels] the embedding of the prompt that the mapper leads to.
    """

    mapper: Tensor
    target: Tensor
    cross: Window
    self_: Window
    self_positions: int

    def check(self, positive: Tensor) -> None:
        if not same_prompt(positive, self.target):
            raise ValueError(
                "The sampler's positive is not the target prompt of this edit: connect Prompt Edit's target output."
            )

    def active(self, fraction: float) -> bool:
        return fraction in self.cross or fraction in self.self_

    def wants(self, layer: Layer, fraction: float) -> bool:
        if layer.kind == "cross":
            return fraction in self.cross
        return fraction in self.self_ and layer.positions <= self.self_positions

    def read(self, layer: Layer, source: Inputs, target: Inputs) -> Inputs:
        if layer.kind == "self":
            return Inputs(source.query, source.key, target.value)
        return Inputs(source.query, source.key, self.mapper.to(target.value) @ target.value)
