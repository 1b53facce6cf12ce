"""The demo model that follows instructions: stages `instruct` and `instruct-export` of `python dev.py train`.

As InstructPix2Pix (arXiv 2211.09800, section 3.2): the first convolution gets channels for the image to edit, zero at
first, and the model learns from pairs of pictures with an instruction; of 5 % of them the instruction is left out, of
5 % the image, of 5 % both. Everything else changes by two thin matrices a layer, so that the file stays small. A
quarter of each batch are pairs that `dev.py pairs` made in `checkpoints/pairs`; the rest are scenes rendered before and
after an edit, for the demo model is too small to draw things as clearly as they have to be learned.
"""

from __future__ import annotations

import json
import math
import random
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from . import data, edits, scenes
from .denoiser import ALPHA_BAR, TIMESTEPS
from .distil import Lora, frozen
from .instruct import FIRST, INSTRUCT_WEIGHTS
from .instructions import instructions, words
from .model import TEXT
from .run import CHECKPOINTS, Run, fitted_autoencoder
from .team import Team
from .text import attention

PAIRS = CHECKPOINTS / "pairs"
RENDERED = 4000
SHARE = 0.25  # of each batch, of the pairs that the pack made
RANK = 16
KINDS = tuple(kind for kind in edits.EDITS if kind != "random")
# Up to where a number drawn from 0 to 1 leaves out the instruction alone, both, and the image alone.
NO_TEXT, NO_BOTH, NO_IMAGE = 0.05, 0.10, 0.15


class Instructed(nn.Module):
    """The shipped model, and beside it what alone is trained."""

    def __init__(self) -> None:
        super().__init__()
        base = frozen()
        text = base.text
        self.frozen = (base,)  # no submodule: it is neither trained nor saved
        self.first = len(text.ids)
        self.ids = [token for word in words() for token in text.tokenizer(word)["input_ids"][1:-1]]
        text.row |= {token: self.first + i for i, token in enumerate(self.ids)}
        self.tokens = nn.Parameter(text.tokens.mean(0) + 0.1 * torch.randn(len(self.ids), TEXT["hidden_size"]))
        self.image = nn.Parameter(torch.zeros_like(base.unet.get_parameter(FIRST)))
        self.lora = nn.ModuleDict({"unet": Lora(base.unet, RANK), "text": Lora(text, RANK)})

    def rows(self, said: list[str]) -> Tensor:
        return self.frozen[0].text.rows(said)

    def forward(self, noisy: Tensor, timestep: Tensor, image: Tensor, rows: Tensor) -> Tensor:
        """v [b, c, h, w] of noisy latents, of the latents of the image to edit and of an instruction's token rows."""
        unet, text = self.frozen[0].unet, self.frozen[0].text
        tokens = {"tokens": torch.cat([text.tokens, self.tokens])}
        context = functional_call(text, self.lora["text"].patched(text) | tokens, rows)
        weights = self.lora["unet"].patched(unet)
        weights[FIRST] = torch.cat([weights[FIRST], self.image], 1)
        options = {"transformer_options": {"optimized_attention_override": attention}}
        return functional_call(unet, weights, (torch.cat([noisy, image], 1), timestep.float(), context), options)

    def file(self) -> dict[str, Tensor]:
        """What `instruct.patched` takes, in fp16."""
        tensors = {"image": self.image, "tokens": self.tokens}
        for part, lora in self.lora.items():
            for name, up, down in zip(lora.shapes, lora.up, lora.down, strict=True):
                tensors |= {f"{part}.{name}.up": up, f"{part}.{name}.down": down}
        halves = {key: value.detach().half().contiguous() for key, value in tensors.items()}
        return halves | {"ids": torch.tensor(self.ids, dtype=torch.int32)}


class Pairs(NamedTuple):
    """Latents [n, c, h, w] before and after, fp16, and token rows [n, 77] of the instructions."""

    before: Tensor
    after: Tensor
    rows: Tensor


def rendered(processes: int) -> tuple[Tensor, Tensor, list[str]]:
    """Latents of scenes before and after an edit, and what was said."""
    parts = 2 * processes
    with ProcessPoolExecutor(processes) as pool:
        before, after, said = zip(*pool.map(_render, range(parts), [RENDERED // parts] * parts), strict=True)
    return torch.cat(before), torch.cat(after), sum(said, [])


def _render(number: int, count: int) -> tuple[Tensor, Tensor, list[str]]:
    torch.set_num_threads(1)
    rng, autoencoder = random.Random(f"instructions {number}"), fitted_autoencoder()
    sides, told = ([], []), []
    while len(told) < count:
        edit = edits.draw(rng, KINDS[len(told) % len(KINDS)], pair=rng.random() < 0.3)
        if said := instructions(edit):
            told.append(rng.choice(said))
            for side, scene in zip(sides, (edit.source, edit.target), strict=True):
                pixels = torch.from_numpy(scenes.render(scene)).movedim(-1, 0)[None]
                side.append(autoencoder.encode(2 * pixels - 1).half())
    return torch.cat(sides[0]), torch.cat(sides[1]), told


def made() -> tuple[Tensor, Tensor, list[str]]:
    """Of the pairs that the pack made."""
    path, autoencoder = PAIRS / "metadata.jsonl", fitted_autoencoder()
    if not path.exists():
        raise SystemExit(f"there are no pairs in {PAIRS} yet: make them by dev.py pairs --output {PAIRS}")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    sides = []
    for side in ("input", "edited"):
        drawn = np.stack([np.asarray(Image.open(PAIRS / line[f"{side}_file_name"])) for line in lines])
        sides.append(autoencoder.encode(data.as_pixels(torch.from_numpy(drawn).movedim(-1, 1))).half())
    return *sides, [line["instruction"] for line in lines]


def train_instruct(minutes: float, rate: float, decay: bool, fresh: bool, batch: int, processes: int) -> None:
    student = Instructed()
    run = Run("instruct", student, fresh)
    unsaid = student.rows([""])
    sources = []
    for before, after, said in (made(), rendered(processes)):
        sources.append(Pairs(before, after, student.rows(said)))
    # A channel counts as much as it moves the pixels: outlines and colours show in the first ones, texture in the last.
    weight = fitted_autoencoder().basis.norm(dim=1).view(-1, 1, 1)
    weight = weight / weight.mean()
    print(f"{len(sources[0].rows)} pairs that were made, {len(sources[1].rows)} rendered", flush=True)
    size = batch // processes
    shares = (round(SHARE * size), size - round(SHARE * size))

    def loss(generator: torch.Generator) -> Tensor:
        chosen = [
            torch.randint(0, len(s.rows), (n,), generator=generator) for s, n in zip(sources, shares, strict=True)
        ]
        drawn = ([column[i] for column in s] for s, i in zip(sources, chosen, strict=True))
        before, clean, rows = (torch.cat(columns) for columns in zip(*drawn, strict=True))
        before, clean = before.float(), clean.float()
        left_out = torch.rand((size,), generator=generator)
        rows = torch.where((left_out < NO_BOTH)[:, None], unsaid, rows)
        before = torch.where(((left_out >= NO_TEXT) & (left_out < NO_IMAGE)).view(-1, 1, 1, 1), 0.0, before)
        strata = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
        # Half of them from the third of the noise levels at which things take shape.
        strata = strata + 0.5 / math.tau * (math.tau * strata).sin()
        timestep = (strata * TIMESTEPS).long().clamp(0, TIMESTEPS - 1)
        alpha_bar = ALPHA_BAR[timestep].view(-1, 1, 1, 1)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
        v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean
        return ((student(noisy, timestep, before, rows) - v).square() * weight).mean()

    team = Team(run.parameters, loss, processes, run.step)
    for _ in run.steps(minutes, rate, decay):
        run.update(team.backward())


def export_instruct() -> None:
    student = Instructed()
    run = Run("instruct", student)
    run.use_average()
    save_file(student.file(), INSTRUCT_WEIGHTS, {"steps": json.dumps({"instruct": run.step})})
    print(f"{INSTRUCT_WEIGHTS} ({INSTRUCT_WEIGHTS.stat().st_size / 1e6:.2f} MB), step {run.step}")
