"""Distils an edit into a small network that ComfyUI runs without this pack: `python dev.py distil`.

As pix2pix-zero (arXiv 2302.03027) does with a conditional GAN: pairs of pictures that an edit has made teach a network
that needs neither prompt nor diffusion. Here it is a NAFNet (2204.04676) in the class of `spandrel`, by which the host
reads upscale models, so that the file goes into `models/upscale_models` and runs in Upscale Image (using Model). The
loss is the mean error of the pixels and of the steps between neighbours, with no discriminator.

Pairs are those of `dev.py pairs`, or with its table what `dev.py batch` has edited by any workflow. A tenth of them is
held out; the file holds the averaged weights that did best on these.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from spandrel.architectures.NAFNet import NAFNet
from torch import Tensor, nn

from ..host.files.pairs import METADATA
from .batch import read_table
from .jobs import edited_path, is_edited

ENCODER, MIDDLE, DECODER = (1, 1, 1, 2), 4, (2, 1, 1, 1)  # blocks of each size, from the largest and to it
ROUND = 50  # steps between two looks at what is held out
HELD_OUT, MOST_HELD_OUT = 0.1, 64
CUT_OFF = 16  # pixels a side, fewer of which an autoencoder may have cut off the picture before
MEMORY = 0.995  # of the averaged weights
WARM_UP = 100  # steps until the rate is reached
SETTINGS = ("width", "batch", "crop", "rate", "seed")


class Pair(NamedTuple):
    before: Path
    after: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=Path, required=True, metavar="FOLDER", help="of dev.py pairs or dev.py batch")
    parser.add_argument("--table", type=Path, metavar="FILE", help="the table by which dev.py batch made the folder")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="ends in .safetensors")
    parser.add_argument("--minutes", type=float, default=20, help="after which no more steps are begun (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on where the training of this output ended")
    parser.add_argument("--width", type=int, default=16, help="channels of the network's first layer (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step (%(default)s)")
    parser.add_argument("--crop", type=int, default=256, help="side of what is learnt from at once (%(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="of learning (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)


@torch.inference_mode(False)
def run(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    try:
        pairs = read_pairs(arguments.pairs, arguments.table)
        side = min(arguments.crop, smallest_side(pairs))
        learnt, held_out = divided(pairs, arguments.seed)
        settings = {name: getattr(arguments, name) for name in SETTINGS} | {"pairs": fingerprint(pairs)}
        training = Training(arguments.output, settings, side, arguments.resume)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(learnt)} pairs to learn from, {len(held_out)} held out", flush=True)
    spent = 0.0
    while spent < arguments.minutes:
        loss, error = training.round(learnt, held_out)
        spent = (time.monotonic() - start) / 60
        best = ", the best so far" if error == training.best else ""
        print(f"step {training.step}: {spent:.1f} min, loss {loss:.4f}, held out {error:.4f}{best}", flush=True)
    size = arguments.output.stat().st_size / 1e6
    print(f"{arguments.output} ({size:.1f} MB), held out {training.best:.4f}: put it into models/upscale_models")


# --- pairs of pictures -----------------------------------------------------------------------------------------------


def read_pairs(folder: Path, table: Path | None) -> list[Pair]:
    """Those of a folder in which metadata.jsonl names them, or of the table that was edited there.

    Raises ValueError for what is neither.
    """
    if table is not None:
        jobs, faults = read_table(table)
        missing = [job.key for job in jobs if not is_edited(folder, job)]
        for left_out in (*faults, *(f"{key} is not edited in {folder}" for key in missing)):
            print(f"left out: {left_out}")
        pairs = [Pair(job.image, edited_path(folder, job)) for job in jobs if job.key not in missing]
    elif (folder / METADATA).is_file():
        lines = (folder / METADATA).read_text(encoding="utf-8").splitlines()
        pairs = [_named(folder, number, line) for number, line in enumerate(lines, 1)]
    elif (folder / "edited").is_dir():
        raise ValueError(f"{folder} is of dev.py batch, whose table says what its pictures were before: add --table")
    else:
        raise ValueError(f"{folder} has no {METADATA}: name a folder that dev.py pairs or dev.py batch has made")
    if len(pairs) < 2:
        raise ValueError(f"{folder} has {len(pairs)} pairs of pictures: two are needed, of which one is held out")
    return pairs


def _named(folder: Path, number: int, line: str) -> Pair:
    try:
        named = json.loads(line)
        return Pair(*(folder / named[f"{side}_file_name"] for side in ("input", "edited")))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder / METADATA}, line {number}: it has to name input_file_name and edited_file_name"
        ) from error


def smallest_side(pairs: Sequence[Pair]) -> int:
    """In pixels, of all pictures. Raises ValueError, naming the file, where one cannot be learnt from."""
    return min(min(after.shape[1:]) for _, after in map(read, pairs))


def read(pair: Pair) -> tuple[Tensor, Tensor]:
    """Both pictures [3, height, width] in 0..1.

    Of the one before, the part that the other shows: autoencoders cut the sides of a picture to a multiple of theirs.
    """
    before, after = map(_opened, pair)
    over = [one - other for one, other in zip(before.size, after.size, strict=True)]
    if not all(0 <= pixels < CUT_OFF for pixels in over):
        sizes = " and ".join(f"{picture.width} x {picture.height}" for picture in (before, after))
        raise ValueError(f"{pair.before} and {pair.after} are of different sizes, {sizes}")
    left, top = (pixels // 2 for pixels in over)
    before = before.crop((left, top, left + after.width, top + after.height))
    return tuple(torch.from_numpy(np.array(side)).movedim(-1, 0) / 255 for side in (before, after))


def _opened(path: Path) -> Image.Image:
    """Turned as a camera says that it was held, as Load Image turns it."""
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def divided(pairs: Sequence[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """What is learnt from, and what is held out."""
    count = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(pairs))))
    held_out = set(random.Random(seed).sample(range(len(pairs)), count))
    return [pair for i, pair in enumerate(pairs) if i not in held_out], [pairs[i] for i in sorted(held_out)]


def fingerprint(pairs: Sequence[Pair]) -> str:
    digest = hashlib.sha256()
    for path in (path for pair in pairs for path in pair):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


# --- training --------------------------------------------------------------------------------------------------------


class Training:
    """A network in training, and the file beside its output from which it goes on, to the same bits on a processor."""

    def __init__(self, output: Path, settings: dict, side: int, resume: bool) -> None:
        """side: in pixels, of what is learnt from at once. Raises ValueError for an output of another training."""
        self.output, self.state_path = output, output.with_suffix(".training")
        self.settings, self.side, self.step, self.best = settings, side, 0, float("inf")
        self.device = comfy.model_management.get_torch_device()
        torch.manual_seed(settings["seed"])
        network = NAFNet(
            width=settings["width"],
            enc_blk_nums=list(ENCODER),
            middle_blk_num=MIDDLE,
            dec_blk_nums=list(DECODER),
        )
        self.network = network.to(self.device)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
        self.generator = torch.Generator().manual_seed(settings["seed"])
        if output.suffix != ".safetensors":
            raise ValueError(f"--output {output} has to end in .safetensors")
        if not output.absolute().parent.is_dir():
            raise ValueError(f"--output {output} is in no existing folder")
        if resume:
            self._go_on()
        elif output.exists() or self.state_path.exists():
            raise ValueError(f"{output} has been trained before: add --resume to go on, or name another --output")

    def round(self, learnt: Sequence[Pair], held_out: Sequence[Pair]) -> tuple[float, float]:
        """Takes ROUND steps and keeps them: their mean loss, and the error of what is held out."""
        losses = [self._step(learnt) for _ in range(ROUND)]
        error = self.error(held_out)
        if error < self.best:
            self.best = error
            partial = self.output.with_suffix(".partial")
            tensors = {name: tensor.contiguous() for name, tensor in self.average.state_dict().items()}
            save_file(tensors, partial, {"step": str(self.step), "held_out": f"{error:.6f}"})
            partial.replace(self.output)
        self._save()
        return sum(losses) / len(losses), error

    def _step(self, learnt: Sequence[Pair]) -> float:
        chosen = torch.randint(len(learnt), (self.settings["batch"],), generator=self.generator)
        crops = [self._crop(learnt[i]) for i in chosen.tolist()]
        before, after = (torch.stack(side).to(self.device) for side in zip(*crops, strict=True))
        self.optimizer.param_groups[0]["lr"] = self.settings["rate"] * min(1.0, (self.step + 1) / WARM_UP)
        found = loss(self.network(before), after)
        self.optimizer.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        kept = min(MEMORY, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - kept)
        return found.item()

    def _crop(self, pair: Pair) -> tuple[Tensor, Tensor]:
        before, after = read(pair)
        spare = [size - self.side + 1 for size in after.shape[1:]]
        top, left = (int(torch.randint(room, (), generator=self.generator)) for room in spare)
        part = (slice(None), slice(top, top + self.side), slice(left, left + self.side))
        return before[part], after[part]

    @torch.no_grad()
    def error(self, pairs: Sequence[Pair]) -> float:
        """The mean absolute one of whole pictures, by the averaged weights."""
        errors = []
        for before, after in map(read, pairs):
            made = self.average(before[None].to(self.device)).clamp(0, 1)[0].cpu()
            errors.append((made - after).abs().mean().item())
        return sum(errors) / len(errors)

    def _save(self) -> None:
        state = {
            "settings": self.settings,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "best": self.best,
        }
        partial = self.state_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.state_path)

    def _go_on(self) -> None:
        if not self.state_path.exists():
            raise ValueError(f"there is no {self.state_path} to resume from: leave --resume out")
        state = torch.load(self.state_path, map_location=self.device)
        for name, before in state["settings"].items():
            if self.settings[name] != before:
                told = "other pairs" if name == "pairs" else f"--{name} {before}, not {self.settings[name]}"
                raise ValueError(f"the training of {self.output} began with {told}: name another --output")
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.step, self.best = state["step"], state["best"]


def loss(made: Tensor, wanted: Tensor) -> Tensor:
    """The mean absolute error of pictures [b, 3, height, width], and of their steps from pixel to pixel."""
    error = made - wanted
    return error.abs().mean() + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
