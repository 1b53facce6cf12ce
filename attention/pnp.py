"""Plug-and-Play diffusion features (arXiv 2211.12572): the source's features and self-attention in the decoder.

Section 4, equations 5 and 6: for the first tau_f of the run the residual features of one decoder block are the source's
before the skip connection is added, and for the first tau_A the self-attention maps of the decoder's layers are the
source's; the target's own values pass through them. Pure torch.

In flow transformers the queries and keys of the image's tokens are those of MM-DiT Prompt-to-Prompt (arXiv 2508.07519);
RF-Solver-Edit (2411.04746) and FireFlow (2412.07517) take the values, Stable Flow (2411.14430) keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..host.layer import Block, Inputs, Layer, Read

# tau_f and tau_a; the paper's code injects in one step more than it says.
PRESETS = {"paper": (0.82, 0.52), "diffusers version": (0.8, 0.5)}
# What of an attention is the source's.
READS = {"queries, keys": ("query", "key"), "values": ("value",), "keys, values": ("key", "value")}


@dataclass(frozen=True)
class PlugAndPlay:
    """features and attention: the blocks to inject. tau_f and tau_a: until which fraction of the schedule.

    reads: what of an attention is the source's, fields of `Inputs`.
    """

    features: tuple[Block, ...]
    attention: tuple[Block, ...]
    tau_f: float
    tau_a: float
    reads: tuple[str, ...] = READS["queries, keys"]
    node = "PnP Feature Injector"

    def check(self, positive: Tensor, batch: int) -> None:
        """Any target will do: the method knows no words."""

    def at(self, fraction: float) -> _Rule | None:
        features = self.features if fraction < self.tau_f else ()
        attention = self.attention if fraction < self.tau_a else ()
        return _Rule(features, attention, self.reads) if features or attention else None


@dataclass(frozen=True)
class _Rule:
    features: tuple[Block, ...]
    attention: tuple[Block, ...]
    reads: tuple[str, ...]
    node = PlugAndPlay.node
    everyone = True

    def wants(self, layer: Layer) -> bool:
        return layer.kind == "self" and layer.block_id in self.attention

    def read(self, layer: Layer, source: Inputs, target: Inputs) -> tuple[Read, ...]:
        return (Read(target._replace(**{name: getattr(source, name) for name in self.reads})),)
