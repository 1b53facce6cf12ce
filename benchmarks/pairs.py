"""Makes pairs of pictures with an instruction, to train InstructPix2Pix on: `python dev.py pairs`.

As in the paper (arXiv 2211.09800, section 3.1): both captions are sampled from one noise, the edited one by
Prompt-to-Prompt, several times a pair of captions with its fraction of the run and the guidance drawn at random; what a
CLIP finds unlike in the picture, in the text or in the direction is left out. The folder is one that `imagefolder` of
the `datasets` library reads: pictures beside `metadata.jsonl`, by which a run goes on where it was interrupted.

Captions are lines of caption, edited caption and instruction between tabs; without a file, of demo scenes drawn at
random.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sample import prepare_noise
from PIL import Image
from torch import Tensor

from ..attention.editing import rewrite
from ..attention.p2p import Settings, Window
from ..demo import edits as demo_edits
from ..demo import model as demo_model
from ..demo import scenes
from ..demo.instructions import instructions
from ..host.branch.source import attach
from ..inversion.run import Guidance, record, resample
from ..metrics.clip import clip_direction, clip_score
from ..nodes.networks import Missing, text_embedding
from .edits import encode, one_edit
from .picture import decode
from .pie import load_clip

METADATA = "metadata.jsonl"
FRACTIONS = (0.1, 0.9)  # of the run in which attention is shared, as in the paper
EVERY_LAYER = 1024  # positions a side
KINDS = tuple(kind for kind in demo_edits.EDITS if kind != "random")


class Asked(NamedTuple):
    caption: str
    edited: str
    instruction: str


class Likeness(NamedTuple):
    """Of pairs of pictures, [b] each: cosines of picture and picture, of picture and caption, and of both ways."""

    image: Tensor
    text: Tensor
    direction: Tensor

    def passes(self, least: Likeness) -> Tensor:
        return (self.image >= least.image) & (self.text >= least.text) & (self.direction >= least.direction)


Judge = Callable[[Tensor, Tensor, Sequence[Asked]], Likeness]
"""From pictures [b, h, w, 3] in 0..1 before and after, and what was asked."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("pairs"), metavar="FOLDER", help="%(default)s")
    parser.add_argument("--pairs", type=int, default=1000, help="how many to have in the end (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="after which no batch is begun (%(default)s)")
    parser.add_argument("--captions", type=Path, metavar="FILE", help="default: of demo scenes")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: the demo model for few steps")
    parser.add_argument("--samples", type=int, default=4, help="of a pair of captions (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="pairs at once (%(default)s)")
    parser.add_argument("--side", type=int, default=demo_model.SIZE, help="of the pictures, in pixels (%(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="%(default)s; 50 where the model is not of few steps")
    parser.add_argument("--cfg", type=float, nargs=2, default=(1.0, 2.0), help="1 to 2; 7.5 to 15 in the paper")
    parser.add_argument("--clip", metavar="NAME", help="a whole CLIP in text_encoders, to filter by")
    parser.add_argument("--clip-vision", default="clip_vision_l.safetensors", metavar="NAME", help="in clip_vision")
    parser.add_argument("--image", type=float, default=0.7, help="least likeness of the pictures (%(default)s)")
    parser.add_argument("--text", type=float, default=0.2, help="of each picture and its caption (%(default)s)")
    parser.add_argument("--direction", type=float, default=0.2, help="of the ways between both (%(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="that make batches at once (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    try:
        arguments.asked = asked_in_turn(arguments)
        arguments.output.mkdir(parents=True, exist_ok=True)
        kept, first = already(arguments.output)
        loaded(arguments.checkpoint, arguments.side)
        judge(arguments.clip, arguments.clip_vision)
    except (OSError, ValueError, Missing) as error:
        sys.exit(f"error: {error}")
    made, batches = 0, -(-len(arguments.asked) // arguments.batch)
    with ProcessPoolExecutor(arguments.processes) as pool:
        for number in range(first, batches, arguments.processes):
            if kept >= arguments.pairs or time.monotonic() - start > 60 * arguments.minutes:
                break
            numbers = range(number, min(number + arguments.processes, batches))
            for lines in pool.map(partial(make_batch, arguments), numbers):
                made, kept = made + arguments.batch, kept + len(lines)
                with (arguments.output / METADATA).open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            print(f"{kept} pairs; {made} made in {(time.monotonic() - start) / 60:.1f} min", flush=True)
    print(f"{kept} pairs in {arguments.output}")


def asked_in_turn(arguments: argparse.Namespace) -> list[Asked]:
    """Every pair of captions as often as it is sampled, in an order that the seed draws."""
    rng = random.Random(arguments.seed)
    if arguments.captions is None:
        found = demo_captions(rng, arguments.pairs)
    else:
        found = read_captions(arguments.captions, check=arguments.checkpoint is None)
    return [asked for _ in range(arguments.samples) for asked in rng.sample(found, len(found))]


def demo_captions(rng: random.Random, count: int) -> list[Asked]:
    found = []
    while len(found) < count:
        edit = demo_edits.draw(rng, KINDS[len(found) % len(KINDS)])
        if said := instructions(edit):
            found.append(Asked(edit.source.caption, edit.target.caption, rng.choice(said)))
    return found


def read_captions(path: Path, check: bool) -> list[Asked]:
    """check: whether the captions have to be the demo model's. Raises ValueError, naming the line, where one is not."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.split("\t")]
        if len(parts) != len(Asked._fields) or not all(parts):
            raise ValueError(f"{path}, line {number}: it has to be caption, edited caption and instruction with tabs")
        for caption in parts[: 2 * check]:
            try:
                scenes.parse(caption, 0)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
        found.append(Asked(*parts))
    if not found:
        raise ValueError(f"{path} holds no captions")
    return found


def already(output: Path) -> tuple[int, int]:
    """How many pairs are in the folder, and the first batch that none of them is of."""
    path = output / METADATA
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return len(lines), max((json.loads(line)["batch"] + 1 for line in lines), default=0)


# --- a batch ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def make_batch(arguments: argparse.Namespace, number: int) -> list[dict]:
    """Writes the pictures of one batch that pass the filter; their lines of the metadata."""
    comfy.utils.PROGRESS_BAR_ENABLED = False
    torch.set_num_threads(max(1, torch.get_num_threads() // arguments.processes))
    rng = random.Random(f"{arguments.seed} {number}")
    asked = arguments.asked[number * arguments.batch :][: arguments.batch]
    fraction, cfg, seed = rng.uniform(*FRACTIONS), rng.uniform(*arguments.cfg), rng.randrange(2**32)
    model, clip, vae, empty = loaded(arguments.checkpoint, arguments.side)
    before, after = pair(model, clip, empty.repeat(len(asked), 1, 1, 1), asked, fraction, cfg, arguments.steps, seed)
    before, after = (torch.from_numpy(decode(vae, latent)).clamp(0, 1) for latent in (before, after))
    drawn = {"batch": number, "p2p": round(fraction, 3), "cfg": round(cfg, 3), "seed": seed}
    likeness = None
    compare = judge(arguments.clip, arguments.clip_vision)
    if compare is not None:
        likeness = compare(before, after, asked)
        passes = likeness.passes(Likeness(arguments.image, arguments.text, arguments.direction))
    lines = []
    for i, each in enumerate(asked):
        if likeness is not None and not passes[i]:
            continue
        names = {side: f"{number:05}-{i:02}-{side}.png" for side in ("input", "edited")}
        for picture, name in zip((before[i], after[i]), names.values(), strict=True):
            Image.fromarray((picture * 255).round().byte().numpy()).save(arguments.output / name)
        found = {name: round(float(value[i]), 4) for name, value in likeness._asdict().items()} if likeness else {}
        captions = {"instruction": each.instruction, "caption": each.caption, "edited_caption": each.edited}
        lines.append({f"{side}_file_name": name for side, name in names.items()} | captions | drawn | found)
    return lines


def pair(
    model: ModelPatcher,
    clip: comfy.sd.CLIP,
    empty: Tensor,
    asked: Sequence[Asked],
    fraction: float,
    cfg: float,
    steps: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Latents [b, c, h, w] of both captions from one noise, which `seed` draws; attention is shared for `fraction`.

    empty: the latent [b, c, h, w] to begin with.
    """
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    source, target = ([encode(clip, list(captions))] for captions in list(zip(*asked, strict=True))[:2])
    negative, noise = [encode(clip, [""])], prepare_noise(empty, seed)
    euler = comfy.samplers.sampler_object("euler")
    trajectory, before = record(model, Guidance(source, negative, cfg), euler, sigmas, noise, empty, seed)
    edits = [rewrite(clip, each.caption, each.edited)[2] for each in asked]
    shared = Window(0, fraction)
    edited = attach(model, trajectory, one_edit(edits, 1.0, Settings(shared, shared, EVERY_LAYER)))
    return before, resample(edited, trajectory, Guidance(target, negative, cfg))


@cache
def loaded(checkpoint: Path | None, side: int) -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE, Tensor]:
    """Model, text encoder and autoencoder, and an empty latent [1, c, h, w]. Raises ValueError for a wrong size."""
    if checkpoint is None:
        model, clip, vae = demo_model.load(few_steps=True)
    else:
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint))
    return model, clip, vae, torch.zeros_like(vae.encode(torch.zeros(1, side, side, 3)))


@cache
def judge(clip: str | None, vision: str) -> Judge | None:
    """None without a CLIP. Raises Missing without its files."""
    if clip is None:
        return None
    text, images = load_clip(clip, vision)

    def compare(before: Tensor, after: Tensor, asked: Sequence[Asked]) -> Likeness:
        one, other = (images.encode_image(pictures)["image_embeds"] for pictures in (before, after))
        captions = list(zip(*asked, strict=True))[:2]
        said, edited = (torch.cat([text_embedding(text, caption) for caption in side]) for side in captions)
        of_text = torch.minimum(clip_score(one, said), clip_score(other, edited)) / 100
        return Likeness(clip_score(one, other) / 100, of_text, clip_direction(one, other, said, edited))

    return compare
