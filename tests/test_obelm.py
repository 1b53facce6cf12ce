"""O-BELM: against its formulas in float64, exact up and down and through the host, and under the edits."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch

from palimpsest.attention.record import Recording, record_attention
from palimpsest.guidance.cross_attention import CrossAttentionGuidance
from palimpsest.guidance.proximal import INVERSION, Proximal
from palimpsest.host.branch.guide import attach_guide
from palimpsest.host.branch.guided import attach_rule
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.inversion import obelm
from palimpsest.inversion.replay import OBELMSampler, invert_obelm
from palimpsest.inversion.run import Guidance
from palimpsest.nodes.exact import OBELMInversion
from test_ddim import relative
from test_edict import noise
from test_edit_friendly import IMAGE
from test_local_blend import blend
from test_source import ALWAYS, swap
from tiny import Tiny, execute, rows_of, tiny_model


def karras(steps: int) -> torch.Tensor:
    """[steps + 1] falling sigmas above 0."""
    return comfy.samplers.calculate_sigmas(tiny_model().get_model_object("model_sampling"), "karras", steps + 1)[:-1]


@pytest.mark.parametrize("steps", [2, 39])
def test_up_and_down_are_exact(steps: int) -> None:
    levels = karras(steps).double().tolist()[::-1]
    states = [IMAGE, IMAGE + (levels[1] - levels[0]) * noise(IMAGE, levels[1])]
    for below, sigma, above in zip(levels, levels[1:], levels[2:], strict=False):
        states.append(obelm.step(*states[-2:], noise(states[-1], sigma), below, sigma, above))
    assert relative(states[-1], IMAGE) > 1
    before, x = states[-1], states[-2]
    for above, sigma, below in zip(levels[::-1], levels[-2::-1], levels[-3::-1], strict=False):
        before, x = x, obelm.step(before, x, noise(x, sigma), above, sigma, below)
    assert relative(x, IMAGE) < 1e-11


def test_steps_equal_the_formulas() -> None:
    """With h_i = sigma_i - sigma_{i-1} and H = h_{i+1}, as the paper has the step down, and its inverse."""
    low, sigma, high = 0.7, 1.1, 1.9
    h, big = sigma - low, high - sigma
    x, above, eps = IMAGE, IMAGE.flip(0), noise(IMAGE, sigma)
    below = (h / big) ** 2 * above + (big**2 - h**2) / big**2 * x - h * (h + big) / big * eps
    assert relative(obelm.step(above, x, eps, high, sigma, low), below) < 1e-12
    assert relative(obelm.step(below, x, eps, low, sigma, high), above) < 1e-12


def test_it_is_exact_on_a_parabola() -> None:
    """So that the local error is of third order: dx / dsigma is the noise."""
    low, sigma, high = 0.7, 1.1, 1.9
    path = [IMAGE + level * IMAGE.flip(0) + level**2 * IMAGE.flip(1) for level in (low, sigma, high)]
    slope = IMAGE.flip(0) + 2 * sigma * IMAGE.flip(1)
    assert relative(obelm.step(path[2], path[1], slope, high, sigma, low), path[0]) < 1e-12


def inverted(tiny: Tiny, cfg: float = 3.0) -> OBELMSampler:
    guidance = Guidance(tiny.source, tiny.negative, cfg)
    trajectory, sampler = invert_obelm(tiny.model, guidance, tiny.image, karras(tiny.steps + 1)[1:].cpu())
    tiny.follow(trajectory)
    return sampler


def test_edits_read_from_a_store_as_live(tiny: Tiny) -> None:
    sampler = inverted(tiny)
    recording = Recording(ALWAYS, ALWAYS, 64, 1 << 30, torch.float32, torch.device("cpu"))
    store = record_attention(tiny.model, tiny.trajectory, recording)
    live = tiny.sample(attach(tiny.model, tiny.trajectory, swap()), sampler=sampler)
    stored = tiny.sample(attach(tiny.model, tiny.trajectory, swap(), store), sampler=sampler)
    assert relative(stored, live) < 1e-4


def test_local_blend_holds_on_to_the_source(tiny: Tiny) -> None:
    """A mask of nothing gives the image back; one of everything changes nothing."""
    sampler = inverted(tiny)
    plain = tiny.sample(tiny.model, sampler=sampler)
    masks = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    nothing, everything = (
        tiny.sample(
            attach_blend(tiny.model, tiny.trajectory, blend(phrases=None, user=mask, start=0.0)), sampler=sampler
        )
        for mask in masks
    )
    assert relative(nothing, tiny.image) < 1e-6
    assert torch.equal(everything, plain)


@pytest.mark.parametrize("two", [False, True])
def test_guidances_that_move_the_latent_stand_beside_it(tiny: Tiny, two: bool) -> None:
    """Proximal Guidance's pull and Cross Attention Guidance reach the states of the sampler."""
    sampler = inverted(tiny)
    plain = tiny.sample(tiny.model, sampler=sampler)
    pulled = attach_rule(tiny.model, Proximal(0.0, 1.0, 1.0, INVERSION), tiny.trajectory)
    guided = attach_guide(tiny.model, tiny.trajectory, CrossAttentionGuidance(5.0, 1.0, 64, two), False)
    results = [tiny.sample(model, sampler=sampler) for model in (pulled, guided)]
    for result in results:
        assert torch.isfinite(result).all()
        assert relative(result, plain) > 1e-3


def test_one_evaluation_a_step(tiny: Tiny) -> None:
    """The first call is made twice, and the sampler has none where both are given."""
    model, rows = rows_of(tiny.model)
    tiny.model = model
    sampler = inverted(tiny, cfg=1.0)
    assert rows == [1] * (tiny.trajectory.steps + 1)
    rows.clear()
    tiny.sample(attach(model, tiny.trajectory, swap()), sampler=sampler)
    assert rows == [3] * tiny.trajectory.steps


def test_the_node_runs_a_part_and_refuses_in_a_sentence(tiny: Tiny) -> None:
    parts = {"model": tiny.model, "source": tiny.source, "image": {"samples": tiny.image}}
    trajectory, noise_, sigmas, sampler = execute(OBELMInversion, **parts, steps=10)
    assert torch.equal(sigmas, karras(10)[2:])
    assert torch.equal(trajectory.sigmas, sigmas)
    settings = {"noise": noise_["samples"], "sigmas": sigmas, "cfg": 1.0}
    assert relative(tiny.sample(tiny.model, tiny.source, sampler=sampler, **settings), tiny.image) < 1e-6
    with pytest.raises(ValueError, match="runs 1 of 10 at strength 0.14: raise strength, or steps"):
        execute(OBELMInversion, **parts, steps=10, strength=0.14)
    with pytest.raises(ValueError, match="OBELM Inversion at cfg 3 needs the negative input"):
        execute(OBELMInversion, **parts, steps=10, cfg=3.0)
    tiny.follow(trajectory)
    with pytest.raises(ValueError, match="The sampler of OBELM Inversion runs 8 steps from sigma"):
        tiny.sample(tiny.model, sampler=sampler, sigmas=sigmas[:-1])


def test_many_steps_stay_in_bounds() -> None:
    tiny = Tiny(steps=80)
    sampler = inverted(tiny, cfg=1.0)
    assert tiny.trajectory.states.abs().max() < 100 * tiny.sigmas[0]
    assert relative(tiny.sample(tiny.model, tiny.source, cfg=1.0, sampler=sampler), tiny.image) < 1e-6
