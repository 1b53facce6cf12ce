"""Rendered scenes on disk, from which the demo model learns, and the encoder that is fitted to them."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from . import scenes
from .model import CHANNELS, PATCH, Autoencoder

FOLDER = Path(__file__).parent / "checkpoints" / "scenes"
SHARD = 2000
PAIRS = 0.55  # share of scenes with two things, the harder half
DETAIL = 0.3  # of its share in the picture, as an exponent, that a channel keeps: 0 makes all channels equally large


def render(count: int, processes: int) -> None:
    """At least `count` scenes on disk, in shards; those that are there already stay."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(-(-count // SHARD)) if not _path(number).exists()]
    with ProcessPoolExecutor(processes) as pool:
        for done in pool.map(_render_shard, missing):
            print(f"rendered scenes {done * SHARD} to {(done + 1) * SHARD}", flush=True)


def shards() -> list[Path]:
    found = sorted(FOLDER.glob("*.npz"))
    if not found:
        raise SystemExit("there are no scenes yet: run the stage data first")
    return found


def pictures(shard: Path) -> Tensor:
    """Of one shard, [SHARD, 3, 128, 128] uint8."""
    return torch.from_numpy(np.load(shard)["pictures"]).movedim(-1, 1)


def latents(autoencoder: Autoencoder) -> tuple[Tensor, list[str]]:
    """Of all shards: latents [n, 16, 16, 16] fp16 and their captions."""
    encoded, captions = [], []
    for shard in shards():
        encoded += [autoencoder.encode(as_pixels(part)).half() for part in pictures(shard).split(500)]
        captions += np.load(shard)["captions"].tolist()
    return torch.cat(encoded), captions


def held_out(count: int) -> tuple[Tensor, list[str]]:
    """Scenes that no shard holds: pixels in [-1, 1] and captions."""
    drawn, captions = _draw("held out", count)
    return as_pixels(torch.from_numpy(drawn).movedim(-1, 1)), captions


def as_pixels(drawn: Tensor) -> Tensor:
    return drawn.float() / 127.5 - 1


def fit_encoder(autoencoder: Autoencoder) -> None:
    """Principal components of 8 x 8 patches, each scaled to (its standard deviation) ** DETAIL, in fp16's precision."""
    drawn = pictures(shards()[0])
    patches = rearrange(as_pixels(drawn), "b c (h i) (w j) -> (b h w) (c i j)", i=PATCH, j=PATCH)
    mean = patches.mean(0)
    variances, directions = torch.linalg.eigh((patches - mean).T.cov().double())
    variances, directions = variances.flip(0)[:CHANNELS], directions.flip(1)[:, :CHANNELS].T
    deviations = variances.sqrt()
    wanted = deviations**DETAIL
    wanted /= wanted.square().mean().sqrt()
    autoencoder.mean.copy_(mean.half())
    autoencoder.basis.copy_((directions * (deviations / wanted)[:, None]).half())


def _path(number: int) -> Path:
    return FOLDER / f"{number:03}.npz"


def _render_shard(number: int) -> int:
    drawn, captions = _draw(f"shard {number}", SHARD)
    partial = _path(number).with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, pictures=drawn, captions=np.array(captions))
    partial.replace(_path(number))
    return number


def _draw(seed: str, count: int) -> tuple[np.ndarray, list[str]]:
    rng = random.Random(seed)
    drawn = [scenes.sample(rng, pair=rng.random() < PAIRS) for _ in range(count)]
    pixels = np.stack([(scenes.render(scene) * 255 + 0.5).astype(np.uint8) for scene in drawn])
    return pixels, [scene.caption for scene in drawn]
