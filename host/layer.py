"""What edits and the source branch say to each other about one attention layer. Pure torch."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Layer(NamedTuple):
    """One attention layer: "self" or "cross", where it stands in the UNet, and its number of positions (h * w)."""

    kind: str
    block: str
    number: int
    index: int
    positions: int


class Inputs(NamedTuple):
    """What the rows of one chunk read in an attention layer, before its projections."""

    query: Tensor  # [b, positions, channels]
    key: Tensor  # [b, tokens, channels]
    value: Tensor  # [b, tokens, channels]


class Edit(Protocol):
    """A rule for what the target reads from the source. `fraction` is the finished part of the schedule, 0 to 1."""

    def check(self, positive: Tensor) -> None:
        """Raises ValueError where the sampler's positive embedding [b, tokens, channels] is not the edit's target."""

    def active(self, fraction: float) -> bool:
        """Whether any layer reads from the source at this point."""

    def wants(self, layer: Layer, fraction: float) -> bool:
        """Whether this layer does."""

    def read(self, layer: Layer, source: Inputs, target: Inputs) -> Inputs:
        """What the target reads there instead of `target`; tokens are those of the two prompts, never tiled."""
