"""Prompt-to-Prompt (arXiv 2208.01626): cross-attention control without materialising a map. Pure torch.

Section 3.2: while the schedule lasts, the target's cross-attention map becomes

    A* = A_source W_source + A_target W_target

(word swap, refinement and re-weighting, each for chosen words: `PromptToPrompt.tables`), and its self-attention map
becomes the source's in layers of low resolution. Attention is linear in its values and the projections have no bias, so
each term is ordinary attention over the value inputs W @ context_target: only inputs are swapped.

Where a source reads values of its own (StyleDiffusion, arXiv 2303.15649), the words of the target that both prompts
have read them too for as long as `values` lasts: shared^T @ the source's in place of the target's own value inputs.

In the joint attention of a flow transformer the columns of the text are the cross-attention map and those of the image
the self-attention map of each image token (MM-DiT Prompt-to-Prompt, arXiv 2508.07519, reads the latter alone).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..host.layer import Inputs, Layer, Read
from .alignment import SIMILAR, Carry, same_prompt


@dataclass(frozen=True)
class Window:
    """A part of the schedule, [start, end) as fractions; empty where end <= start."""

    start: float
    end: float

    def __contains__(self, fraction: float) -> bool:
        return self.start <= fraction < self.end


NEVER = Window(0.0, 0.0)


@dataclass(frozen=True)
class Settings:
    """Schedules of an edit. new_words: their gain.

    alignment: "swap", "refine" or SIMILAR, None for the Prompt Edit's own.
    """

    cross: Window
    self_: Window
    self_max_side: int
    alignment: str | None = None
    new_words: float = 1.0


PRESETS = {
    "paper": Settings(Window(0.0, 0.8), Window(0.0, 0.4), 16),
    "null-text notebook": Settings(Window(0.0, 0.8), Window(0.0, 0.5), 32),
    "PIE-Bench": Settings(Window(0.0, 0.4), Window(0.0, 0.6), 32, "refine", 2.0),
    "InfEdit": Settings(Window(0.0, 0.7), Window(0.0, 0.7), 1024, SIMILAR),  # layers of every size
}


@dataclass(frozen=True)
class PromptToPrompt:
    """An edit towards k target prompts; the images of a batch take them in turn.

    carry: the alignment's tables, [k, source tokens, target tokens] and [k, target tokens].
    target: [k, target tokens, channels], the embeddings of the prompts that the tables lead to.
    gain: [k, target tokens], the re-weighting factor c of each token.
    cross: [2, k, target tokens], start and end of each token's replacement.
    self_positions: the greatest h * w of a layer whose self-attention map is replaced, infinite for all.
    shared: [k, source tokens, target tokens], which of the source's tokens stand in for the target's, 0 for new ones.
    """

    carry: Carry
    target: Tensor
    gain: Tensor
    cross: Tensor
    self_: Window
    self_positions: float
    shared: Tensor | None = None
    values: Window = NEVER
    node = "P2P Attention Controller"

    def check(self, positive: Tensor, batch: int) -> None:
        if not same_prompt(positive, self.target):
            raise ValueError(
                "The sampler's positive is not the target prompt of this edit: connect Prompt Edit's target output."
            )
        if batch < len(self.target):
            raise ValueError(
                f"The edit has {len(self.target)} target prompts but the sampler's latent {batch} image: put Repeat "
                f"Latent Batch with amount {len(self.target)} before latent_image."
            )

    def at(self, fraction: float) -> _Rule | None:
        self_positions = self.self_positions if fraction in self.self_ else 0
        values = fraction in self.values
        cross = values or bool(self.alpha(fraction).any())
        if not cross and not self_positions:
            return None
        return _Rule(self.tables(fraction) if cross else None, self_positions, self.shared if values else None)

    def alpha(self, fraction: float) -> Tensor:
        """[k, target tokens], 1 where a token's map is replaced."""
        start, end = self.cross
        return ((start <= fraction) & (fraction < end)).float()

    def tables(self, fraction: float) -> tuple[Tensor, Tensor]:
        """W_source [k, source tokens, target tokens] and the diagonal of W_target [k, target tokens].

        With alpha the schedule and c the gain: W_source = carry D(c alpha), W_target = D(own c alpha + 1 - alpha). Swap
        has own = 0 but for inserted words; refinement has own = 1 where a token is new.
        """
        alpha = self.alpha(fraction)
        scaled = self.gain * alpha
        return self.carry.source * scaled[:, None], self.carry.own * scaled + 1 - alpha


class _Placed(NamedTuple):
    """Tables where a model's values are: [b, source tokens, target tokens], and the diagonal matrices [b, target
    tokens, target tokens], None where they are 0. carries: which of the b carry anything over. shared: as carried.
    """

    carried: Tensor
    own: Tensor | None
    carries: tuple[bool, ...]
    shared: Tensor | None


@dataclass(frozen=True)
class _Rule:
    """placed: the tables of one model call, which all its layers share."""

    tables: tuple[Tensor, Tensor] | None
    self_positions: float
    shared: Tensor | None = None
    placed: dict[tuple, _Placed] = field(default_factory=dict, compare=False)
    node = PromptToPrompt.node
    everyone = False
    reads = ("query", "key")
    features = ()

    def wants(self, layer: Layer) -> bool:
        return self.tables is not None if layer.kind == "cross" else layer.positions <= self.self_positions

    def read(self, layer: Layer, source: Inputs, target: Inputs) -> tuple[Read, ...]:
        if layer.kind == "self":
            return (Read(Inputs(source.query, source.key, target.value)),)
        value = target.value.flatten(2)
        carried, own, carries, shared = self.beside(value, source.key.shape[1])
        if shared is not None:
            value = mixed(shared, source.value, value)

        def term(inputs: Inputs, carry: Tensor, carried_value: Tensor) -> Read:
            return Read(inputs._replace(value=carried_value.unflatten(-1, target.value.shape[2:])), carry, carries)

        from_source = term(source, carried, carried @ value)
        if own is None:
            return (from_source,)
        return from_source, term(target, own, own.diagonal(0, 1, 2)[..., None] * value)

    def beside(self, value: Tensor, source: int) -> _Placed:
        """The tables for values [b, target tokens, channels] and so many tokens of the source."""
        place = *value.shape[:2], source, value.device, value.dtype
        if place not in self.placed:
            images = torch.arange(len(value))
            carried, own = (table[images % len(table)] for table in self.tables)
            carried = cut(carried, source, value.shape[1])
            own = own[:, : value.shape[1]].diag_embed().to(value) if self.tables[1].any() else None
            shared = None if self.shared is None else self.shared[images % len(self.shared)].to(value)
            self.placed[place] = _Placed(carried.to(value), own, tuple(carried.flatten(1).any(1).tolist()), shared)
        return self.placed[place]


def mixed(shared: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Value inputs [b, target tokens, channels]: the source's where `shared` [b, source tokens, target tokens] has any,
    else the target's.
    """
    return torch.where(shared.any(1)[..., None], shared.mT @ source, target)


def cut(carried: Tensor, source: int, target: int) -> Tensor:
    """A table [b, source tokens, target tokens] for a model that reads no more than the first so many of each prompt.

    What goes to target tokens beyond, which are padding, goes to the last that is read.
    """
    kept = carried[:, :source, :target].clone()
    kept[..., -1] += carried[:, :source, target:].sum(-1)
    return kept
