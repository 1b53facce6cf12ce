"""The noise-aware CLIP's training: stages `clip`, `clip-test` and `clip-export` of `python dev.py train`.

What the frozen half of the UNet tells of scenes under noise is written down beforehand, each with some captions that
are wrong in one place: by place and time alone two scenes of a batch are told apart all too easily. Each process
contrasts its own part of a batch.
"""

from __future__ import annotations

import json
import random
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from . import data, scenes
from .clip import CLIP_WEIGHTS, SHARPEST, DemoClip, Eye, Judge, load_clip
from .denoiser import ALPHA_BAR, TIMESTEPS
from .distil import frozen
from .edits import EDITS, draw, edits
from .run import CHECKPOINTS, Run, fitted_autoencoder, save
from .team import Team

SEEN = CHECKPOINTS / "seen"
SHARDS = 10  # of scenes that are looked at, each scene once
CLEAN = 0.15  # of them are seen without noise
WRONG = 3  # captions to each scene that are wrong in one place; a step takes one of them


class Examples(NamedTuple):
    """features: of the eye, [n, positions, channels] in fp16; rows, wrong: captions' tokens [n, (WRONG,) 77]."""

    features: Tensor
    rows: Tensor
    wrong: Tensor


def look(processes: int) -> None:
    """At all scenes of SHARDS shards; what is on disk already stays."""
    SEEN.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(SHARDS) if not _path(number).exists()]
    with ProcessPoolExecutor(processes) as pool:
        for number in pool.map(_look, missing):
            print(f"looked at scenes {number * data.SHARD} to {(number + 1) * data.SHARD}", flush=True)


def _path(number: int) -> Path:
    return SEEN / f"{number:03}.pt"


@torch.no_grad()
def _look(number: int) -> int:
    torch.set_num_threads(1)
    rng, generator = random.Random(number), torch.Generator().manual_seed(number)
    shard, eye, autoencoder, judge = data.shards()[number], shipped_eye(), fitted_autoencoder(), Judge()
    captions, features = np.load(shard)["captions"].tolist(), []
    levels = torch.linspace(0, TIMESTEPS - 1, len(captions))[torch.randperm(len(captions), generator=generator)].long()
    levels[torch.rand(len(captions), generator=generator) < CLEAN] = -1
    for drawn, level in zip(data.pictures(shard).split(50), levels.split(50), strict=True):
        clean = autoencoder.encode(data.as_pixels(drawn))
        noise = torch.randn(clean.shape, generator=generator)
        features.append(eye(noisy(clean, noise, level), level.clamp_min(0)).half())
    wrong = [judge.text.rows(_wrong(caption, rng)) for caption in captions]
    save(Examples(torch.cat(features), judge.text.rows(captions), torch.stack(wrong))._asdict(), _path(number))
    return number


def shipped_eye() -> Eye:
    """The demo model's half, told what its text encoder says of an empty caption."""
    eye, denoiser = Eye(), frozen()
    weights = denoiser.unet.state_dict()
    eye.unet.load_state_dict({key: weights[key] for key in eye.unet.state_dict()})
    eye.unsaid.copy_(denoiser.text(denoiser.text.rows([""])))
    return eye.requires_grad_(False)


def noisy(clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """Latents at timesteps [b]; those at -1 stay clean."""
    kept = torch.cat([ALPHA_BAR, torch.ones(1)])[level].view(-1, 1, 1, 1)
    return kept.sqrt() * clean + (1 - kept).sqrt() * noise


def _wrong(caption: str, rng: random.Random) -> list[str]:
    scene = scenes.parse(caption, 0)
    kinds = [made for made in edits(scene, rng.randrange(len(scene.things))).values() if made]
    return [rng.choice(made).caption for made in rng.choices(kinds, k=WRONG)]


def examples() -> Examples:
    files = [torch.load(_path(number)) for number in range(SHARDS)]
    return Examples(*(torch.cat([file[name] for file in files]) for name in Examples._fields))


def train_clip(minutes: float, rate: float, decay: bool, fresh: bool, batch: int, processes: int) -> None:
    judge = Judge()
    judge.text.load_state_dict(frozen().text.state_dict())
    run = Run("clip", judge, fresh)
    look(processes)
    known = examples()
    share = batch // processes
    print(f"{len(known.rows)} scenes, {sum(p.numel() for p in judge.parameters()) / 1e6:.2f} M parameters", flush=True)

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(0, len(known.rows), (share,), generator=generator)
        wrong = known.wrong[chosen, torch.randint(0, WRONG, (share,), generator=generator)]
        images = judge.seen(known.features[chosen].float())
        texts = judge.said(torch.cat([known.rows[chosen], wrong]))
        alike = judge.scale.exp().clamp_max(SHARPEST) * images @ texts.T
        truth = torch.arange(share)
        return (cross_entropy(alike, truth) + cross_entropy(alike[:, :share].T, truth)) / 2

    team = Team(run.parameters, loss, processes, run.step)
    for _ in run.steps(minutes, rate, decay):
        run.update(team.backward())


@torch.no_grad()
def test_clip() -> None:
    """Of the shipped file: retrieval among held-out scenes under noise, and one-word edits told apart."""
    clip = load_clip()
    pixels, captions = data.held_out(256)
    clean, texts = clip.autoencoder.encode(pixels), clip.text(captions)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    truth = torch.arange(len(captions))
    for level in (-1, 250, 500, 750):
        at = torch.full((len(captions),), level)
        alike = clip.image(noisy(clean, noise, at), at.clamp_min(0)) @ texts.T
        shares = [float((found.argmax(1) == truth).float().mean()) for found in (alike, alike.T)]
        print(f"t {max(level, 0)}: caption of 256 found in {shares[0]:.0%}, picture in {shares[1]:.0%}")
    rng, told = random.Random("edits"), {kind: [] for kind in EDITS[:-1]}
    for _, kind in zip(range(100), cycle(told), strict=False):
        told[kind].append(_told(clip, rng, kind))
    for kind, right in told.items():
        print(f"{kind}: {sum(right)} of {len(right)}")
    print(f"in all: {sum(map(sum, told.values()))} of 100")


def _told(clip: DemoClip, rng: random.Random, kind: str) -> bool:
    """Whether the target's caption is nearer to the target's picture than the source's is."""
    edit = draw(rng, kind)
    image = clip.picture(torch.from_numpy(scenes.render(edit.target))[None])
    source, target = (image @ clip.text([edit.source.caption, edit.target.caption]).T)[0]
    return bool(target > source)


def export_clip() -> None:
    run = Run("clip", Judge())
    run.use_average()
    tensors = {key: value.half().contiguous() for key, value in run.module.state_dict().items()}
    tensors["unsaid"] = shipped_eye().unsaid.half()
    save_file(tensors, CLIP_WEIGHTS, {"steps": json.dumps({"clip": run.step})})
    print(f"{CLIP_WEIGHTS} ({CLIP_WEIGHTS.stat().st_size / 1e6:.2f} MB), step {run.step}")
