"""Pairs of pictures with an instruction, made by Prompt-to-Prompt to train on: InstructPix2Pix (arXiv 2211.09800).

Section 3.1.2: both captions are sampled from one noise, the edited one by Prompt-to-Prompt, several times a pair of
captions, each time with another share of the run in which attention is shared, and another guidance; what a CLIP finds
unlike in the pictures, in picture and caption, or in the direction of both is left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from comfy.model_patcher import ModelPatcher
from comfy.sample import prepare_noise
from comfy.samplers import calculate_sigmas, sampler_object
from torch import Tensor

from ..host.files.pairs import Pairs
from ..host.files.trajectory import EULER, Trajectory
from ..host.quote import quoted
from ..inversion.run import Guidance, record, resample
from ..metrics.clip import clip_direction, clip_score
from .p2p import Settings, Window

EVERY_LAYER = 1024  # positions a side


class Asked(NamedTuple):
    caption: str
    edited: str
    instruction: str


class Ranges(NamedTuple):
    """What is drawn evenly: the share of the run in which attention is shared, and the guidance."""

    share: tuple[float, float] = (0.1, 0.9)
    cfg: tuple[float, float] = (7.5, 15.0)


class Drawn(NamedTuple):
    share: float
    cfg: float
    seed: int

    @classmethod
    def by(cls, rng: random.Random, ranges: Ranges) -> Drawn:
        return cls(rng.uniform(*ranges.share), rng.uniform(*ranges.cfg), rng.randrange(2**32))

    @property
    def settings(self) -> Settings:
        shared = Window(0, self.share)
        return Settings(shared, shared, EVERY_LAYER)


class Likeness(NamedTuple):
    """Of pairs of pictures, [b] each: cosines of picture and picture, of picture and caption, and of both ways."""

    image: Tensor
    text: Tensor
    direction: Tensor

    @classmethod
    def of(cls, before: Tensor, after: Tensor, caption: Tensor, edited: Tensor) -> Likeness:
        """By a CLIP's embeddings [b, c] of the pictures and [b or 1, c] of the captions. text: the lesser of two."""
        text = clip_score(before, caption).minimum(clip_score(after, edited)) / 100
        return cls(clip_score(before, after) / 100, text, clip_direction(before, after, caption, edited))

    def passes(self, least: Likeness) -> Tensor:
        """[b], whether all three are as high as those of `least`."""
        return (self.image >= least.image) & (self.text >= least.text) & (self.direction >= least.direction)

    def one(self, i: int) -> dict[str, float]:
        """Those of one pair, rounded to be read."""
        return {name: round(float(values[i]), 4) for name, values in self._asdict().items()}


LEAST = Likeness(0.75, 0.2, 0.2)
"""The paper's filter."""


def asked(text: str, separator: str, what: str) -> list[Asked]:
    """From lines of caption, edited caption and instruction; empty ones are passed over.

    what: how sentences call the text. Raises ValueError, naming the line, where one is not of three parts.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        parts = [part.strip() for part in line.split(separator)]
        if not any(parts):
            continue
        if len(parts) != len(Asked._fields) or not all(parts):
            between = "tabs" if separator == "\t" else f"'{separator}'"
            raise ValueError(
                f"Line {number} of {what} is {quoted(line)}: write caption, edited caption and instruction with "
                f"{between} between them."
            )
        found.append(Asked(*parts))
    if not found:
        raise ValueError(f"There is nothing in {what}: write lines of caption, edited caption and instruction.")
    return found


def told(wanted: Asked, drawn: Drawn) -> dict:
    """What is said of a pair, by the names of the authors' data where it has them."""
    said = {"instruction": wanted.instruction, "caption": wanted.caption, "edited_caption": wanted.edited}
    return said | {"p2p": round(drawn.share, 3), "cfg": round(drawn.cfg, 3), "seed": drawn.seed}


def written(
    pairs: Pairs,
    batch: int,
    before: Tensor,
    after: Tensor,
    said: Sequence[dict],
    likeness: Likeness | None,
    least: Likeness,
) -> list[dict]:
    """Writes those pictures [b, h, w, 3] in 0..1 whose likeness is enough, all where none was measured.

    said: of each pair, [b]. Returned for `Pairs.finish`, with the names of the pictures and their likeness.
    """
    if likeness is None:
        found, passes = [{}] * len(said), [True] * len(said)
    else:
        found = [likeness.one(i) for i in range(len(said))]
        passes = likeness.passes(least).tolist()
    return [
        pairs.draw(batch, i, (before[i], after[i])) | said[i] | found[i] for i, passed in enumerate(passes) if passed
    ]


def pair(
    model: ModelPatcher,
    source: list,
    target: list,
    negative: list,
    drawn: Drawn,
    empty: Tensor,
    steps: int,
    edited: Callable[[Trajectory], ModelPatcher],
) -> tuple[Tensor, Tensor]:
    """Latents [b, c, h, w] of the source and of the target prompt, from one noise that `drawn` has the seed of.

    empty: the latent [b, c, h, w] to begin with. edited: the MODEL of the target, by the source's trajectory. Raises
    ValueError for models and prompts that cannot be edited.
    """
    sigmas = calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    noise = prepare_noise(empty, drawn.seed)
    trajectory, before = record(
        model, Guidance(source, negative, drawn.cfg), sampler_object(EULER), sigmas, noise, empty, drawn.seed
    )
    return before, resample(edited(trajectory), trajectory, Guidance(target, negative, drawn.cfg))
