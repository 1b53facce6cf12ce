"""What edits and the source branch say to each other about one attention layer. Pure torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

Block = tuple[str, int]
"""A block as the host names it: ("input", 4), ("middle", 0), ("output", 11); in a flow transformer ("double", 0)."""


class Layer(NamedTuple):
    """A "self" or "cross" attention layer or the "feature" of a residual block: where it stands in the network,
    and the size of its image.
    """

    kind: str
    block: str
    number: int
    index: int
    height: int
    width: int

    @property
    def positions(self) -> int:
        return self.height * self.width

    @property
    def block_id(self) -> Block:
        return self.block, self.number


class Inputs(NamedTuple):
    """What the rows of one chunk read in an attention layer, before its projections.

    A flow transformer's joint attention is two layers under one softmax: "self" of the image's tokens, and "cross" from
    these to the prompt's. There they come after the projections, and channels may be [heads, d].
    """

    query: Tensor  # [b, positions, channels]
    key: Tensor  # [b, tokens, channels]
    value: Tensor  # [b, tokens, channels]


class Part(NamedTuple):
    """The attention to some keys of a self-attention layer alone, and how much of it each position takes."""

    keys: Tensor  # [m] the positions of the keys
    weight: Tensor  # [positions, 1]; those of all parts together are 1


class Read(NamedTuple):
    """One term of what the target's attention returns, which is their sum: the attention of `inputs`.

    carry: [1 or b, tokens of inputs, tokens of target], where the value is carry @ the target's own value and the
    target's map thus A @ carry; None where that map is A itself.
    carries: for each of the b whether its carry from the source holds anything, where there is one.
    parts: in self-attention, what takes the place of one attention to all keys; none where that stays.
    """

    inputs: Inputs
    carry: Tensor | None = None
    carries: tuple[bool, ...] = ()
    parts: tuple[Part, ...] = ()


class Rule(Protocol):
    """An edit at one point of the schedule.

    node: the display name of the node that made it. everyone: whether all other prompts' rows read as the target's do.
    reads: the fields of `Inputs` that it takes from the source; the others may be None there.
    features: the blocks whose residual features are to be the source's.
    """

    node: str
    everyone: bool
    reads: tuple[str, ...]
    features: tuple[Block, ...]

    def wants(self, layer: Layer) -> bool:
        """Whether the target reads from the source in this layer."""

    def read(self, layer: Layer, source: Inputs, target: Inputs) -> tuple[Read, ...]:
        """What the target reads in an attention layer instead of `target`: the terms of what its attention returns.

        Tokens are those of the two prompts, never tiled. Both have the batch of the target.
        """


def fields_read(layer: Layer, rules: Sequence[Rule]) -> set[str]:
    """The fields of `Inputs` that rules take from the source in a layer of a joint attention.

    Words of the source are what its image's queries find in their keys.
    """
    own = {field for rule in rules if rule.wants(layer) for field in rule.reads}
    if layer.kind == "cross":
        return own - {"query"}
    crossing = layer._replace(kind="cross")
    return own | {"query" for rule in rules if rule.wants(crossing)}


class Edit(Protocol):
    """A rule for what the target reads from the source. node: the display name of the node that made it."""

    node: str

    def check(self, positive: Tensor, batch: int) -> None:
        """Raises ValueError where the sampler's positive embedding [k, tokens, channels], for `batch` images, is not
        the edit's target.
        """

    def at(self, fraction: float) -> Rule | None:
        """The edit where `fraction` (0 to 1) of the schedule is finished; None where it reads nothing."""


class Blend(Protocol):
    """Keeps the source outside a mask, after every step."""

    columns: tuple[Tensor, Tensor] | None
    """Of the phrases to measure: [k, source tokens, m], [k, target tokens, m], 1 at a phrase's tokens; None for none.
    The images of a batch take the k in turn.
    """
    layout: bool
    """Whether the phrases' maps are carried by self-attention, which UNets alone can."""

    def check(self, positive: Tensor, batch: int) -> None:
        """As Edit.check."""

    def applies(self, fraction: float) -> bool:
        """Whether the state that is reached where `fraction` of the schedule is finished is blended."""

    def mask(self, source: Tensor | None, target: Tensor | None, size: tuple[int, int]) -> Tensor:
        """[1 or b, 1, *size] in 0..1, 0 where the source is kept, from the phrases' maps so far, [b, m, h, w] each."""
