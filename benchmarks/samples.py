"""How often the demo model draws what it was asked for, read back from the pictures."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch

from ..demo import model as demo_model
from ..demo import scenes, score
from ..inversion.ddim import leading_sigmas
from ..inversion.run import Guidance
from .edits import encode
from .picture import decode, sample, save_grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scenes", type=int, default=50, help="captions with one thing, and as many with two")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg", type=float, nargs="+", default=[3.0, 5.0])
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--picture", type=Path, help="where to save the first samples")


def run(arguments: argparse.Namespace) -> None:
    model, clip, vae = demo_model.load()
    sigmas = leading_sigmas(model.get_model_object("model_sampling").sigmas, arguments.steps)
    negative = [encode(clip, [""])]
    rng, generator = random.Random(arguments.seed), torch.Generator().manual_seed(arguments.seed)
    drawn = {name: [scenes.sample(rng, pair) for _ in range(arguments.scenes)] for name, pair in PAIRS.items()}
    side = demo_model.SIZE // demo_model.PATCH
    shape = (arguments.scenes, demo_model.CHANNELS, side, side)
    noise = {name: torch.randn(shape, generator=generator) * sigmas[0] for name in drawn}
    print("| cfg | things | " + " | ".join(ASPECTS) + " |\n|---|---|" + "---|" * len(ASPECTS))
    columns = []
    for cfg in arguments.cfg:
        for name, asked in drawn.items():
            images = []
            for first in range(0, len(asked), arguments.batch):
                part = slice(first, first + arguments.batch)
                positive = [encode(clip, [scene.caption for scene in asked[part]])]
                latent = sample(model, Guidance(positive, negative, cfg), noise[name][part], sigmas)
                images.extend(decode(vae, latent))
            verdicts = [score.judge(image, scene) for image, scene in zip(images, asked, strict=True)]
            cells = " | ".join(f"{sum(v[a] for v in verdicts)}/{len(verdicts)}" for a in ASPECTS)
            print(f"| {cfg:g} | {name} | {cells} |", flush=True)
            columns.append(np.stack(images[:10]))
    if arguments.picture:
        save_grid(columns, arguments.picture)


PAIRS = {"one": False, "two": True}
ASPECTS = ("style", "place", "time", "count", "relation", "thing", "size", "look", "pose", "extra", "facing", "all")
