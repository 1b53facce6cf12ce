"""The demo CLIP: what it tells apart in clean pictures and through noise, and CLIP guidance by it."""

from __future__ import annotations

import random
from itertools import cycle

import numpy as np
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from palimpsest.demo import scenes
from palimpsest.demo.clip import CLIP_WEIGHTS, DemoClip
from palimpsest.demo.edits import EDITS, Edit, draw
from palimpsest.metrics.clip import clip_direction, clip_score
from palimpsest.nodes.demo import LoadDemoClip


@pytest.fixture(scope="module")
def loaded() -> ModelPatcher:
    with torch.inference_mode():
        (clip,) = LoadDemoClip.execute().result
    return clip


@pytest.fixture(scope="module")
def clip(loaded: ModelPatcher) -> DemoClip:
    return loaded.model


def drawn(*pictures: scenes.Scene) -> Tensor:
    return torch.from_numpy(np.stack([scenes.render(scene) for scene in pictures]))


def some_edits(count: int, kinds: tuple[str, ...] = EDITS[:-1]) -> list[Edit]:
    rng = random.Random("the demo CLIP")
    return [draw(rng, kind) for _, kind in zip(range(count), cycle(kinds), strict=False)]


def test_embeddings(clip: DemoClip) -> None:
    """Of length 1, of every image by itself; the file is small."""
    cases = some_edits(4)
    pictures, texts = (
        clip.picture(drawn(*(case.source for case in cases))),
        clip.text([c.source.caption for c in cases]),
    )
    for embeddings in (pictures, texts):
        assert torch.allclose(embeddings.norm(dim=-1), torch.ones(4))
    assert torch.allclose(clip.picture(drawn(cases[2].source)), pictures[2:3], atol=1e-5)
    assert torch.allclose(clip.text([cases[2].source.caption.upper()]), texts[2:3], atol=1e-5)
    assert CLIP_WEIGHTS.stat().st_size < 3e6


def test_tells_edits_apart(clip: DemoClip) -> None:
    """Of style, place and time: which caption belongs to the picture, and whether pictures go where captions go."""
    cases = some_edits(20, ("background", "style"))
    before, after = (clip.picture(drawn(*(getattr(c, side) for c in cases))) for side in ("source", "target"))
    source, target = (clip.text([getattr(c, side).caption for c in cases]) for side in ("source", "target"))
    assert (clip_score(after, target) > clip_score(after, source)).float().mean() >= 0.95
    assert (clip_direction(before, after, source, target) > 0).float().mean() >= 0.95


@pytest.mark.parametrize(("level", "found"), [(0, 0.6), (500, 0.6), (750, 0.4)])
def test_sees_through_noise(clip: DemoClip, level: int, found: float) -> None:
    """Which of 32 captions belongs to a scene, under the demo model's noise."""
    cases = some_edits(32)
    clean = clip.autoencoder.encode(drawn(*(case.source for case in cases)).movedim(-1, 1) * 2 - 1)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[level].float() if level else torch.ones(())
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    seen = clip.image(kept.sqrt() * clean + (1 - kept).sqrt() * noise, torch.full((32,), level))
    captions = clip.text([case.source.caption for case in cases])
    assert ((seen @ captions.T).argmax(1) == torch.arange(32)).float().mean() >= found
