"""EDICT: against its formulas in float64, exact up and down and through the host, and under the edits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from palimpsest.attention.record import Recording, record_attention
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.inversion.ddim import leading_sigmas
from palimpsest.inversion.edict import Pair, step_down, step_up
from palimpsest.inversion.replay import EDICTSampler, invert_edict
from palimpsest.inversion.run import Guidance, record
from palimpsest.nodes.exact import EDICTInversion
from test_ddim import TABLE, relative
from test_edit_friendly import IMAGE, network
from test_local_blend import blend
from test_source import ALWAYS, swap
from tiny import Tiny, execute, rows_of


def noise(x: Tensor, sigma: float) -> Tensor:
    return network(x / (1 + sigma**2) ** 0.5, sigma)


@pytest.mark.parametrize("steps", [39, 40])
@pytest.mark.parametrize("mixing", [0.93, 1.0])
def test_up_and_down_are_exact_for_odd_and_even_steps(steps: int, mixing: float) -> None:
    sigmas = leading_sigmas(TABLE, 50).double().tolist()[-steps - 1 :]
    pair = Pair(IMAGE, IMAGE)
    for i in reversed(range(steps)):
        pair = step_up(pair, i, sigmas[i], sigmas[i + 1], noise, mixing)
    assert relative(pair.x, IMAGE) > 1
    assert not torch.equal(*pair)
    for i in range(steps):
        pair = step_down(pair, i, sigmas[i], sigmas[i + 1], noise, mixing)
    assert relative(pair.x, IMAGE) < 1e-10
    assert relative(pair.y, IMAGE) < 1e-10


def test_steps_equal_the_formulas() -> None:
    """In z: x = a x + b eps(y), y = a y + b eps(x), both at the old t, then mixed by p; odd steps swap the names."""
    sigmas = leading_sigmas(TABLE, 10).double()
    alphas = 1 / (1 + sigmas**2)
    pair = Pair(IMAGE * sigmas[0], IMAGE.flip(0) * sigmas[0])
    x, y = (part * alphas[0].sqrt() for part in pair)
    p = 0.93
    for i, (old, new) in enumerate(zip(alphas, alphas[1:], strict=False)):
        sigma = float(sigmas[i])
        pair = step_down(pair, i, sigma, float(sigmas[i + 1]), noise, p)
        a = (new / old).sqrt()
        b = (1 - new).sqrt() - a * (1 - old).sqrt()
        if i % 2:
            x, y = y, x
        x = a * x + b * network(y, sigma)
        y = a * y + b * network(x, sigma)
        x = p * x + (1 - p) * y
        y = p * y + (1 - p) * x
        if i % 2:
            x, y = y, x
        assert relative(pair.x * new.sqrt(), x) < 1e-12
        assert relative(pair.y * new.sqrt(), y) < 1e-12


def inverted(tiny: Tiny, cfg: float = 3.0) -> EDICTSampler:
    guidance = Guidance(tiny.source, tiny.negative, cfg)
    trajectory, sampler = invert_edict(tiny.model, guidance, tiny.image, tiny.sigmas[1:], 0.93)
    tiny.follow(trajectory)
    return sampler


def test_rows_a_call(tiny: Tiny) -> None:
    sampler = inverted(tiny)
    model, rows = rows_of(tiny.model)
    tiny.sample(attach(model, tiny.trajectory, swap()), sampler=sampler)
    assert rows == [3] * (2 * tiny.trajectory.steps + 1)  # the first call is made twice


def test_the_node_runs_a_part_and_refuses_in_a_sentence(tiny: Tiny) -> None:
    parts = {"model": tiny.model, "source": tiny.source, "image": {"samples": tiny.image}, "negative": tiny.negative}
    trajectory, noise_, sigmas, sampler = execute(EDICTInversion, **parts, steps=10)
    assert torch.equal(sigmas, leading_sigmas(tiny.model.get_model_object("model_sampling").sigmas, 10)[2:])
    assert torch.equal(trajectory.sigmas, sigmas)
    settings = {"noise": noise_["samples"], "sigmas": sigmas, "cfg": 3.0}
    assert relative(tiny.sample(tiny.model, tiny.source, sampler=sampler, **settings), tiny.image) < 1e-6
    with pytest.raises(ValueError, match="runs none of 10 steps at strength 0.04: raise strength"):
        execute(EDICTInversion, **parts, steps=10, strength=0.04)
    with pytest.raises(ValueError, match="EDICT Inversion at cfg 3 needs the negative input"):
        execute(EDICTInversion, **parts | {"negative": None}, steps=10)
    with pytest.raises(ValueError, match="out of bounds at mixing 0.5, in step .* of 40: raise mixing"):
        execute(EDICTInversion, **parts, steps=50, mixing=0.5)


def test_what_knows_one_state_a_step_is_refused(tiny: Tiny) -> None:
    sampler = inverted(tiny)
    recording = Recording(ALWAYS, ALWAYS, 64, 1 << 30, torch.float32, torch.device("cpu"))
    store = record_attention(tiny.model, tiny.trajectory, recording)
    with pytest.raises(ValueError, match="An attention store knows one state of the source a step, but the sampler"):
        tiny.sample(attach(tiny.model, tiny.trajectory, swap(), store), sampler=sampler)
    blended = attach_blend(tiny.model, tiny.trajectory, blend(phrases=None, user=torch.ones(1, 8, 8)))
    with pytest.raises(ValueError, match="Local Blend knows one state of the source a step, but the sampler of EDICT"):
        tiny.sample(blended, sampler=sampler)
    guidance, empty = Guidance(tiny.source, tiny.negative, 3.0), torch.zeros_like(tiny.noise)
    with pytest.raises(ValueError, match="Record Trajectory keeps one state a step, but the sampler of EDICT"):
        record(tiny.model, guidance, sampler, tiny.sigmas, empty, tiny.noise, 0)
    with pytest.raises(ValueError, match="of EDICT Inversion runs 4 steps from sigma"):
        tiny.sample(tiny.model, sampler=sampler, sigmas=tiny.sigmas[:-1])
