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
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..attention.edit_pairs import LEAST, Asked, Drawn, Likeness, Ranges, asked, pair, told, written
from ..attention.editing import rewrite
from ..demo import edits as demo_edits
from ..demo import model as demo_model
from ..demo import scenes
from ..demo.instructions import instructions
from ..host.branch.source import attach
from ..host.files.pairs import Pairs
from ..host.files.trajectory import Trajectory
from ..host.quote import quoted
from ..nodes.networks import Missing, text_embedding
from .edits import encode, one_edit
from .picture import decode
from .pie import load_clip

KINDS = tuple(kind for kind in demo_edits.EDITS if kind != "random")

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
    parser.add_argument("--image", type=float, default=LEAST.image, help="least likeness of the pictures (%(default)s)")
    parser.add_argument("--text", type=float, default=LEAST.text, help="of each picture and its caption (%(default)s)")
    parser.add_argument(
        "--direction", type=float, default=LEAST.direction, help="of the ways between both (%(default)s)"
    )
    parser.add_argument("--processes", type=int, default=1, help="that make batches at once (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> None:
    start, each = time.monotonic(), map
    with ExitStack() as stack:
        try:
            arguments.asked = asked_in_turn(arguments)
            pairs = folder(arguments)
            if arguments.processes > 1:
                each = stack.enter_context(ProcessPoolExecutor(arguments.processes)).map
            list(each(load, [arguments]))  # not here: torch's threads do not outlive a fork
        except (OSError, ValueError, Missing) as error:
            sys.exit(f"error: {error}")
        make(arguments, pairs, start, each)
    print(f"{len(pairs.lines)} pairs in {arguments.output}")


def make(arguments: argparse.Namespace, pairs: Pairs, start: float, each: Callable[..., Iterable]) -> None:
    """Batches until there are pairs enough, or no time is left. each: what maps a function over numbers of batches."""
    made, batches = 0, -(-len(arguments.asked) // arguments.batch)
    for number in range(pairs.done, batches, arguments.processes):
        if len(pairs.lines) >= arguments.pairs or time.monotonic() - start > 60 * arguments.minutes:
            break
        numbers = range(number, min(number + arguments.processes, batches))
        for batch, lines in zip(numbers, each(partial(make_batch, arguments), numbers), strict=True):
            pairs.finish(batch, lines)
            made += arguments.batch
        print(f"{len(pairs.lines)} pairs; {made} made in {(time.monotonic() - start) / 60:.1f} min", flush=True)


def load(arguments: argparse.Namespace) -> None:
    """Whatever batches are made with. Raises ValueError and Missing where it is not there."""
    loaded(arguments.checkpoint, arguments.side)
    judge(arguments.clip, arguments.clip_vision)


def folder(arguments: argparse.Namespace) -> Pairs:
    """The run's pairs, by all arguments but those that only say how many to make and how fast."""
    other = ("output", "pairs", "minutes", "processes", "run")
    return Pairs(arguments.output, {name: value for name, value in vars(arguments).items() if name not in other})


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
    found = asked(path.read_text(encoding="utf-8-sig"), "\t", str(path))
    for each in found if check else ():
        for caption in (each.caption, each.edited):
            try:
                scenes.parse(caption, 0)
            except ValueError as error:
                raise ValueError(f"{path} has {quoted(caption)}: {error}") from error
    return found


# --- a batch ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def make_batch(arguments: argparse.Namespace, number: int) -> list[dict]:
    """Writes the pictures of one batch that pass the filter; what is said of them."""
    comfy.utils.PROGRESS_BAR_ENABLED = False
    torch.set_num_threads(max(1, torch.get_num_threads() // arguments.processes))
    wanted = arguments.asked[number * arguments.batch :][: arguments.batch]
    drawn = Drawn.by(random.Random(f"{arguments.seed} {number}"), Ranges(cfg=tuple(arguments.cfg)))
    before, after = pictures(arguments, wanted, drawn)
    compare = judge(arguments.clip, arguments.clip_vision)
    likeness = None if compare is None else compare(before, after, wanted)
    least = Likeness(arguments.image, arguments.text, arguments.direction)
    said = [told(each, drawn) for each in wanted]
    return written(folder(arguments), number, before, after, said, likeness, least)


def pictures(arguments: argparse.Namespace, wanted: Sequence[Asked], drawn: Drawn) -> tuple[Tensor, Tensor]:
    """[b, h, w, 3] in 0..1 before and after, a pair for each that is wanted."""
    model, clip, vae, empty = loaded(arguments.checkpoint, arguments.side)
    source, target = ([encode(clip, list(captions))] for captions in list(zip(*wanted, strict=True))[:2])
    rule = one_edit([rewrite(clip, each.caption, each.edited)[2] for each in wanted], 1.0, drawn.settings)
    empty = empty.repeat(len(wanted), 1, 1, 1)

    def edited(trajectory: Trajectory) -> ModelPatcher:
        return attach(model, trajectory, rule)

    latents = pair(model, source, target, [encode(clip, [""])], drawn, empty, arguments.steps, edited)
    before, after = (torch.from_numpy(decode(vae, latent)) for latent in latents)
    return before, after


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

    def compare(before: Tensor, after: Tensor, wanted: Sequence[Asked]) -> Likeness:
        embedded = [images.encode_image(pictures)["image_embeds"] for pictures in (before, after)]
        captions = list(zip(*wanted, strict=True))[:2]
        said = [torch.cat([text_embedding(text, caption) for caption in side]) for side in captions]
        return Likeness.of(*embedded, *said)

    return compare
