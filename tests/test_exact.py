"""Exact inversions alike: the image comes back through the host, and edits read from their trajectories."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comfy.model_base import ModelType
from comfy.samplers import Sampler

from palimpsest.host.branch.source import attach
from test_ddim import relative
from test_edict import inverted as by_edict
from test_edit_friendly import INJECTION
from test_edit_friendly import inverted as by_edit_friendly
from test_obelm import inverted as by_obelm
from test_source import NEVER, split, swap
from tiny import Tiny, tiny_model

Inverted = Callable[..., Sampler]
EXACT = pytest.mark.parametrize("inverted", [by_edict, by_obelm], ids=["edict", "obelm"])


@EXACT
@pytest.mark.parametrize("kind", [ModelType.EPS, ModelType.V_PREDICTION])
@pytest.mark.parametrize("steps", [2, 8, 9])
def test_the_image_comes_back(kind: ModelType, steps: int, inverted: Inverted) -> None:
    """To fp32 rounding, at the guidance of the inversion, where DDIM inversion fails; another prompt edits it."""
    tiny = Tiny(steps=steps, batch=2, model=tiny_model(kind))
    sampler = inverted(tiny)
    same = tiny.sample(tiny.model, tiny.source, cfg=3.0, sampler=sampler)
    assert relative(same, tiny.image) < 1e-6
    assert torch.equal(tiny.sample(tiny.model, tiny.source, cfg=3.0, sampler=sampler), same)
    assert relative(tiny.sample(tiny.model, tiny.target, cfg=3.0, sampler=sampler), tiny.image) > 1e-2
    assert torch.equal(tiny.trajectory.states[-1], tiny.model.model.process_latent_in(tiny.image))


@EXACT
def test_a_batch_equals_its_images(inverted: Inverted) -> None:
    both = Tiny(batch=2)
    sampler = inverted(both)
    for i in range(2):
        alone = Tiny()
        alone.image = both.image[i : i + 1]
        own = inverted(alone)
        assert relative(both.trajectory.states[:, i : i + 1], alone.trajectory.states) < 1e-4
        result = both.sample(both.model, sampler=sampler)[i : i + 1]
        assert relative(result, alone.sample(alone.model, sampler=own)) < 1e-3


@EXACT
@pytest.mark.parametrize("no_memory", [False, True])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_edits_of_nothing_keep_the_image(
    tiny: Tiny, cfg: float, no_memory: bool, inverted: Inverted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is what the network saw of it, of EDICT two states a step; the negative row reads features too."""
    sampler = inverted(tiny, cfg)
    if no_memory:
        split(monkeypatch, tiny)
    for edit in (swap(target=tiny.source[0][0]), INJECTION) if cfg == 1 else (swap(target=tiny.source[0][0]),):
        model = attach(tiny.model, tiny.trajectory, edit)
        assert relative(tiny.sample(model, tiny.source, cfg=cfg, sampler=sampler), tiny.image) < 1e-4


@pytest.mark.parametrize("inverted", [by_edict, by_edit_friendly, by_obelm], ids=["edict", "edit friendly", "obelm"])
def test_edits_read_from_it(tiny: Tiny, inverted: Inverted) -> None:
    sampler = inverted(tiny)
    plain = tiny.sample(tiny.model, sampler=sampler)
    for edit in (swap(), INJECTION):
        assert relative(tiny.sample(attach(tiny.model, tiny.trajectory, edit), sampler=sampler), plain) > 1e-2
    off = attach(tiny.model, tiny.trajectory, swap(cross=NEVER, self_=NEVER))
    assert torch.equal(tiny.sample(off, sampler=sampler), plain)
