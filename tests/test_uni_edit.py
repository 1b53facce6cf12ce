"""Uni-Edit: fusion and correction as the paper has them, in float64, on flow models and UNets, and the part of a
schedule that DDIM Inversion makes for it.
"""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras.nodes_custom_sampler import CFGOverride, Guider_Basic, Guider_DualCFG
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from nodes import KSamplerAdvanced
from torch import Tensor

from flows import FLOWS, Flow
from palimpsest.attention.masactrl import MasaCtrl
from palimpsest.guidance.proximal import INVERSION, Proximal
from palimpsest.guidance.uni_edit import UniEdit, apart
from palimpsest.host.branch.blocks import attention_layers
from palimpsest.host.branch.guided import attach_rule
from palimpsest.host.branch.source import attach
from palimpsest.host.files.trajectory import Trajectory
from palimpsest.host.run.cost import metered
from palimpsest.inversion.run import Guidance, invert, resample
from palimpsest.nodes.guidance import UniEditGuidance
from palimpsest.nodes.inversion import DDIMInversion
from reference import in_float64
from test_flow_edit import CFG, STEPS, Denoise, Parts, close, every_flow
from test_flow_reads import KV, pair
from tiny import Tiny, execute, tiny_model

OMEGA = 5.0


def published(source: Tensor, target: Tensor, omega: float) -> Tensor:
    """The velocity that a step is taken with: both terms of the paper, from its two velocities of one image."""
    difference = target - source
    m = difference.abs().mean(1, keepdim=True)
    m = (m - m.min()) / (m.max() - m.min())
    return m * target + (1 - m) * source + omega * (1 + m) * difference


def guided(model, amount: float = 1.0):
    return execute(UniEditGuidance, model=model, amount=amount)[0]


@every_flow
@pytest.mark.parametrize("omega", [OMEGA, 1.0])
def test_equals_the_papers_formula(flow: Flow, omega: float) -> None:
    """From 0.6 of the schedule, inverted with an empty prompt; also where the host would leave the negative out."""
    parts = Parts(flow)
    empty = flow.prompt(9, 4)
    inputs = {"model": parts.model, "source": empty, "image": {"samples": parts.image}, "steps": STEPS}
    trajectory, *_ = execute(DDIMInversion, **inputs, strength=0.6)
    assert trajectory.steps == 3
    assert torch.equal(trajectory.sigmas, parts.sigmas[2:])
    guidance = Guidance(parts.target, parts.source, omega)
    ours = resample(guided(parts.model), trajectory, guidance)

    def body(denoise: Denoise, image: Tensor) -> Tensor:
        x, levels = trajectory.states[0].double(), trajectory.sigmas.double().tolist()
        for sigma, below in zip(levels, levels[1:], strict=False):
            source, target = ((x - denoise(prompt, x, sigma)) / sigma for prompt in ("source", "positive"))
            x = x + (below - sigma) * published(source, target, omega)
        return x

    assert close(ours, parts.loop(body), 1e-3)
    assert not close(ours, resample(parts.model, trajectory, guidance), 0.05)


@pytest.mark.parametrize("kind", [ModelType.EPS, ModelType.V_PREDICTION])
def test_equals_it_on_unets(kind: ModelType) -> None:
    """In the sampler's space, where the noise is the velocity."""
    tiny = Tiny(model=tiny_model(kind))
    _, predicted = in_float64(tiny.model)
    x, levels = tiny.trajectory.states[0].double(), tiny.sigmas.double()
    for sigma, below in zip(levels, levels[1:], strict=False):
        source, target = (predicted(x, sigma, prompt, {}) for prompt in (tiny.source, tiny.target))
        x = x + (below - sigma) * published(source, target, OMEGA)
    expected = tiny.model.model.process_latent_out(x.float())
    ours = tiny.sample(guided(tiny.model), negative=tiny.source, cfg=OMEGA)
    assert close(ours, expected, 1e-3)
    assert not close(ours, tiny.sample(tiny.model, negative=tiny.source, cfg=OMEGA), 0.05)


@pytest.mark.parametrize("cfg", [OMEGA, 1.0])
def test_omega_is_that_of_a_cfg_override(tiny: Tiny, cfg: float) -> None:
    expected = tiny.sample(guided(tiny.model), negative=tiny.source, cfg=cfg)
    for model in (
        guided(CFGOverride.execute(tiny.model, cfg, 0.0, 1.0)[0]),
        CFGOverride.execute(guided(tiny.model), cfg, 0.0, 1.0)[0],
    ):
        assert torch.equal(tiny.sample(model, negative=tiny.source, cfg=2.0), expected)


def test_its_ends(tiny: Tiny) -> None:
    plain = tiny.sample(tiny.model)
    assert guided(tiny.model, 0.0) is tiny.model
    assert torch.equal(tiny.sample(attach_rule(tiny.model, UniEdit(0.0))), plain)
    between = tiny.sample(guided(tiny.model, 0.5))
    assert not close(between, plain, 0.01)
    assert not close(between, tiny.sample(guided(tiny.model)), 0.01)
    alike = tiny.sample(guided(tiny.model), positive=tiny.source, negative=tiny.source)
    assert close(alike, tiny.sample(tiny.model, positive=tiny.source, cfg=1.0), 1e-5)
    assert torch.equal(tiny.sample(tiny.model), plain)


def test_each_image_has_its_own_positions() -> None:
    """Frames of a video are of one image."""
    difference = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 9]).view(
        2, 1, 1, 1, 1
    )
    found = apart(difference)
    assert found.shape == (2, 1, 3, 8, 8)
    assert found.flatten(1).amin(1).tolist() == [0, 0]
    assert found.flatten(1).amax(1).tolist() == [1, 1]
    for i in range(2):
        assert torch.equal(found[i : i + 1], apart(difference[i : i + 1]))
    assert not apart(torch.ones(1, 4, 8, 8)).any()


def test_beside_an_edit_and_another_guidance(tiny: Tiny) -> None:
    layers = frozenset(attention_layers(tiny.model.model.diffusion_model))
    edit, proximal = MasaCtrl(layers, 0.0, False, None), Proximal(0.4, 0.0, 0.0, INVERSION)
    one = tiny.sample(guided(attach(tiny.model, tiny.trajectory, edit)))
    assert torch.equal(one, tiny.sample(attach(guided(tiny.model), tiny.trajectory, edit)))
    assert not close(one, tiny.sample(guided(tiny.model)), 0.01)
    both = guided(attach_rule(tiny.model, proximal))
    assert not close(tiny.sample(both), tiny.sample(guided(tiny.model)), 0.01)
    assert not close(tiny.sample(both), tiny.sample(attach_rule(tiny.model, proximal)), 0.01)


def test_refusals(tiny: Tiny) -> None:
    model = guided(tiny.model)
    with pytest.raises(ValueError, match="UniEdit Guidance is a multiple of the sampler's guidance, but that is 0"):
        tiny.sample(model, cfg=0.0)
    with pytest.raises(ValueError, match="already carries a UniEdit Guidance: one is enough"):
        guided(model)
    with pytest.raises(ValueError, match=r"another node's guidance \(sampler_pre_cfg_function\), which bends the path"):
        invert(model, Guidance(tiny.source), tiny.image, tiny.sigmas)
    euler = comfy.samplers.sampler_object("euler")
    basic, dual = Guider_Basic(model), Guider_DualCFG(model)
    basic.set_conds(tiny.target)
    dual.set_conds(tiny.target, tiny.source, tiny.negative)
    dual.set_cfg(4.0, 2.0)
    third = Guider_PerpNeg(model)
    third.set_conds(tiny.target, tiny.source, tiny.negative)
    third.set_cfg(OMEGA, 0.0)
    for guider, sentence in (
        (basic, "compares the prompt with the negative one, of which this run has none: use CFGGuider"),
        (dual, "UniEdit Guidance has no effect in the guider Guider_DualCFG"),
        (third, "UniEdit Guidance guides from the negative prompt, but this run's guider from a third one: use CFG"),
    ):
        with pytest.raises(ValueError, match=sentence):
            guider.sample(torch.zeros_like(tiny.noise), tiny.noise, euler, tiny.sigmas, disable_pbar=True, seed=0)


# --- a part of the schedule ------------------------------------------------------------------------------------------


def partly(parts: Tiny | Parts, strength: float, **inputs) -> Trajectory:
    given = {"model": parts.model, "source": parts.source, "image": {"samples": parts.image}, "steps": 5}
    return execute(DDIMInversion, **given | inputs, strength=strength)[0]


def test_a_part_of_the_schedule_is_the_walk_of_its_steps(tiny: Tiny) -> None:
    for parts in (tiny, Parts(FLOWS["Flux"]), Parts(FLOWS["Wan"])):
        whole, part = partly(parts, 1.0), partly(parts, 0.4)
        assert torch.equal(whole.states, invert(parts.model, Guidance(parts.source), parts.image, whole.sigmas).states)
        assert part.steps == 2
        assert torch.equal(part.sigmas, whole.sigmas[3:])
        torch.testing.assert_close(part.states, whole.states[3:], rtol=1e-4, atol=1e-4)
        model, cost = metered(parts.model)
        partly(parts, 0.4, model=model)
        assert len(cost.rows) == (2 if parts is tiny else 3)


@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_an_edit_along_it(name: str) -> None:
    """The source is found at each of its levels."""
    flow = FLOWS[name]
    parts = Parts(flow)
    trajectory = partly(parts, 0.6)
    parts.sigmas = trajectory.sigmas
    layers = attention_layers(parts.model.model.diffusion_model)
    edited = attach(parts.model, trajectory, MasaCtrl(frozenset(layers), 0.0, False, None))
    ours = resample(edited, trajectory, Guidance(parts.target, parts.negative, CFG))
    assert close(ours, pair(parts, flow, trajectory, list(range(len(layers))), KV), 1e-4)


def test_ksampler_advanced_starts_where_it_does() -> None:
    for parts, scheduler in ((Tiny(), "ddim_uniform"), (Parts(FLOWS["Flux"]), "simple")):
        trajectory, noise, _ = execute(
            DDIMInversion,
            model=parts.model,
            source=parts.source,
            image={"samples": parts.image},
            steps=5,
            schedule=scheduler,
            strength=0.6,
        )
        layers = frozenset(attention_layers(parts.model.model.diffusion_model))
        edited = attach(parts.model, trajectory, MasaCtrl(layers, 0.0, False, None))

        def advanced(start: int, parts=parts, scheduler=scheduler, edited=edited, noise=noise) -> Tensor:
            given = edited, "disable", 0, 5, CFG, "euler", scheduler, parts.target, parts.negative, noise
            (latent,) = KSamplerAdvanced().sample(*given, start, 5, "disable")
            return latent["samples"]

        ours = resample(edited, trajectory, Guidance(parts.target, parts.negative, CFG))
        steps = len(comfy.samplers.calculate_sigmas(parts.model.get_model_object("model_sampling"), scheduler, 5)) - 1
        left = steps - trajectory.steps
        assert close(advanced(left), ours, 1e-6)
        with pytest.raises(
            ValueError, match=rf"runs {steps} steps, of which .* the last 3, .* start_at_step .* Advanced to {left}\."
        ):
            advanced(0)


def test_no_part_of_it_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="DDIM Inversion runs none of 5 steps at strength 0.05: raise strength"):
        partly(tiny, 0.05)
