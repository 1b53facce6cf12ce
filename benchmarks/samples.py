"""How often the demo models draw what they were asked for, read back from the pictures."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import comfy.sample
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..demo import model as demo_model
from ..demo import scenes, score
from ..demo.flow import load_flow
from ..inversion.ddim import leading_sigmas
from ..inversion.run import Guidance
from .edits import encode
from .picture import decode, sample, save_grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--flow", action="store_true", help="of the flow model, by the host's euler on 'simple' sigmas")
    parser.add_argument("--scenes", type=int, default=50, help="captions with one thing, and as many with two")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg", type=float, nargs="+", default=[3.0, 5.0])
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--picture", type=Path, help="where to save the first samples")


def run(arguments: argparse.Namespace) -> None:
    model, clip, vae = demo_model.load()
    sigmas = leading_sigmas(model.get_model_object("model_sampling").sigmas, arguments.steps)
    flow, negative = load_flow() if arguments.flow else None, encode(clip, [""])
    rng, generator = random.Random(arguments.seed), torch.Generator().manual_seed(arguments.seed)
    drawn = {name: [scenes.sample(rng, pair) for _ in range(arguments.scenes)] for name, pair in PAIRS.items()}
    side = demo_model.SIZE // demo_model.PATCH
    shape = (arguments.scenes, demo_model.CHANNELS, side, side)
    noise = {name: torch.randn(shape, generator=generator) for name in drawn}
    print("| cfg | things | " + " | ".join(ASPECTS) + " |\n|---|---|" + "---|" * len(ASPECTS))
    columns = []
    for cfg in arguments.cfg:
        for name, asked in drawn.items():
            images = []
            for first in range(0, len(asked), arguments.batch):
                part = slice(first, first + arguments.batch)
                positive = encode(clip, [scene.caption for scene in asked[part]])
                if flow:
                    latent = sample_flow(flow, positive, negative, cfg, noise[name][part], arguments.steps)
                else:
                    guidance = Guidance([positive], [negative], cfg)
                    latent = sample(model, guidance, noise[name][part] * sigmas[0], sigmas)
                images.extend(decode(vae, latent))
            verdicts = [score.judge(image, scene) for image, scene in zip(images, asked, strict=True)]
            cells = " | ".join(f"{sum(v[a] for v in verdicts)}/{len(verdicts)}" for a in ASPECTS)
            print(f"| {cfg:g} | {name} | {cells} |", flush=True)
            columns.append(np.stack(images[:10]))
    if arguments.picture:
        save_grid(columns, arguments.picture)


def sample_flow(model: ModelPatcher, positive: list, negative: list, cfg: float, noise: Tensor, steps: int) -> Tensor:
    parts = (noise, steps, cfg, "euler", "simple", [positive], [negative], torch.zeros_like(noise))
    return comfy.sample.sample(model, *parts, disable_pbar=True)


PAIRS = {"one": False, "two": True}
ASPECTS = ("style", "place", "time", "count", "relation", "thing", "size", "look", "pose", "extra", "facing", "all")
