"""Negative Prompt Guidance and Proximal Guidance: their formulas in float64, their ends, and edits beside them."""

from __future__ import annotations

import math
from collections.abc import Callable

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider
from comfy_extras.nodes_custom_sampler import Guider_Basic
from torch import Tensor

from palimpsest.attention.pnp import PlugAndPlay
from palimpsest.guidance.negative_prompt import CONSTANT, EXPONENTIAL, LINEAR, NPI, Mixture
from palimpsest.guidance.proximal import Proximal
from palimpsest.host.guided import attach_rule
from palimpsest.host.negatives import attach_mixture
from palimpsest.host.source import attach
from palimpsest.inversion.run import Guidance, invert
from palimpsest.nodes.guidance import NegativePromptGuidance, NegativePromptGuider, ProximalGuidance
from reference import in_float64
from test_source import split, swap
from tiny import Tiny, conditioning, execute, rows_of, tiny_model

EMPTY = conditioning(7)
CFG = 4.0
PNP = PlugAndPlay((("output", 1),), (("output", 1), ("output", 2)), 0.8, 0.6)

Combine = Callable[[int, Tensor, Callable[[list], Tensor]], Tensor]
"""Takes a step, x and a function from a prompt to its eps at x; returns the eps to step with."""


def plain_loop(tiny: Tiny, combine: Combine) -> Tensor:
    """DDIM in float64, Euler in sigma, with eps as `combine` makes it."""
    _, predict = in_float64(tiny.model)
    sigmas, x = tiny.sigmas.double(), tiny.trajectory.states[0].double()
    for step, sigma in enumerate(sigmas[:-1]):
        eps = combine(step, x, lambda prompt, x=x, sigma=sigma: predict(x, sigma, prompt, {}))
        x = x + (sigmas[step + 1] - sigma) * eps
    return tiny.model.model.process_latent_out(x)


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# --- negative prompts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [CONSTANT, LINEAR, EXPONENTIAL])
@pytest.mark.parametrize("prediction", [ModelType.EPS, ModelType.V_PREDICTION])
def test_the_negative_is_mixed_as_the_formula_says(schedule: str, prediction: ModelType) -> None:
    tiny = Tiny(model=tiny_model(prediction))
    shares = {CONSTANT: [0.75] * 5, LINEAR: [0.75, 0.5625, 0.375, 0.1875, 0.0]}
    shares[EXPONENTIAL] = [0.75 * math.exp(-1.5 * i) for i in range(5)]

    def combine(step: int, x: Tensor, eps: Callable[[list], Tensor]) -> Tensor:
        alpha = shares[schedule][step]
        negative = alpha * eps(EMPTY) + (1 - alpha) * eps(tiny.negative)
        return negative + CFG * (eps(tiny.target) - negative)

    result = tiny.sample(attach_mixture(tiny.model, EMPTY, Mixture(0.75, schedule)))
    assert distance(result, plain_loop(tiny, combine)) < 1e-4
    assert distance(tiny.sample(tiny.model), result) > 1e-2


def test_ends_equal_the_plain_sampler_bit_for_bit(tiny: Tiny) -> None:
    plain = tiny.sample(tiny.model)
    assert torch.equal(tiny.sample(attach_mixture(tiny.model, EMPTY, Mixture(0.0, LINEAR))), plain)
    whole = attach_mixture(tiny.model, EMPTY, Mixture(1.0, CONSTANT))
    assert torch.equal(tiny.sample(whole), tiny.sample(tiny.model, negative=EMPTY))
    assert torch.equal(tiny.sample(whole, cfg=1.0), tiny.sample(tiny.model, cfg=1.0))


def test_rows_a_step(tiny: Tiny) -> None:
    model, rows = rows_of(tiny.model)
    tiny.sample(attach_mixture(model, EMPTY, Mixture(1.0, LINEAR)))
    assert rows == [2, 3, 3, 3, 2]


def test_negative_prompt_inversion_is_the_source_prompt_as_negative(tiny: Tiny) -> None:
    inputs = {"model": tiny.model, "empty": EMPTY, "preset": NPI, "trajectory": tiny.trajectory}
    (model,) = execute(NegativePromptGuidance, **inputs)
    assert torch.equal(tiny.sample(model), tiny.sample(tiny.model, negative=tiny.source))
    resampled = tiny.sample(tiny.model, positive=tiny.source, cfg=1.0)
    assert distance(tiny.sample(model, positive=tiny.source, cfg=7.5), resampled) < 1e-5


@pytest.mark.parametrize("no_memory", [False, True])
@pytest.mark.parametrize("edit", [swap(), PNP], ids=["p2p", "pnp"])
def test_it_stands_beside_an_edit_in_either_order(
    tiny: Tiny, edit, no_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = Mixture(0.6, CONSTANT)
    expected = tiny.sample(attach(attach_mixture(tiny.model, EMPTY, mixture), tiny.trajectory, edit))
    assert distance(tiny.sample(attach(tiny.model, tiny.trajectory, edit)), expected) > 1e-3
    if no_memory:
        split(monkeypatch, tiny)
    for model in (
        attach(attach_mixture(tiny.model, EMPTY, mixture), tiny.trajectory, edit),
        attach_mixture(attach(tiny.model, tiny.trajectory, edit), EMPTY, mixture),
    ):
        assert distance(tiny.sample(model), expected) < 1e-5


def test_the_guider_equals_the_patch(tiny: Tiny) -> None:
    settings = {"model": tiny.model, "empty": EMPTY, "preset": "Plug-and-Play, generated image"}
    (model,) = execute(NegativePromptGuidance, **settings)
    prompts = {"positive": tiny.target, "negative": tiny.negative}
    (guider,) = execute(NegativePromptGuider, **settings, **prompts, cfg=CFG)
    euler = comfy.samplers.sampler_object("euler")
    result = guider.sample(torch.zeros_like(tiny.noise), tiny.noise, euler, tiny.sigmas, disable_pbar=True, seed=0)
    assert torch.equal(result, tiny.sample(model))


def test_an_interrupt_leaves_nothing_behind(tiny: Tiny) -> None:
    guider = CFGGuider(attach_mixture(tiny.model, EMPTY, Mixture(0.5, CONSTANT)))
    guider.set_conds(tiny.target, tiny.negative)
    guider.set_cfg(CFG)
    keys = set(guider.model_options["transformer_options"])

    def interrupt(*args) -> None:
        raise comfy.model_management.InterruptProcessingException

    euler, zeros = comfy.samplers.sampler_object("euler"), torch.zeros_like(tiny.noise)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        guider.sample(zeros, tiny.noise, euler, tiny.sigmas, callback=interrupt, disable_pbar=True, seed=0)
    assert set(guider.model_options["transformer_options"]) == keys
    assert set(guider.original_conds) == {"positive", "negative"}
    again = guider.sample(zeros, tiny.noise, euler, tiny.sigmas, disable_pbar=True, seed=0)
    assert torch.equal(again, tiny.sample(guider.model_patcher))


def test_refusals(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="takes the source prompt from a trajectory: connect the trajectory"):
        execute(NegativePromptGuidance, model=tiny.model, empty=EMPTY, preset=NPI)
    with pytest.raises(ValueError, match="made with another model"):
        execute(NegativePromptGuidance, model=tiny_model(seed=1), empty=EMPTY, trajectory=tiny.trajectory)
    model = attach_mixture(tiny.model, EMPTY, Mixture(0.5, CONSTANT))
    with pytest.raises(ValueError, match="already carries a Negative Prompt Guidance"):
        attach_mixture(model, EMPTY, Mixture(0.5, CONSTANT))
    guider = Guider_Basic(model)
    guider.set_conds(tiny.target)
    euler = comfy.samplers.sampler_object("euler")
    with pytest.raises(ValueError, match="the guider Guider_Basic has none"):
        guider.sample(torch.zeros_like(tiny.noise), tiny.noise, euler, tiny.sigmas, disable_pbar=True, seed=0)


# --- proximal guidance -----------------------------------------------------------------------------------------------


def test_proximal_guidance_equals_its_formula(tiny: Tiny) -> None:
    image = tiny.trajectory.states[-1].double()

    def combine(step: int, x: Tensor, eps: Callable[[list], Tensor]) -> Tensor:
        sigma, negative = tiny.sigmas[step].double(), eps(tiny.negative)
        difference = eps(tiny.target) - negative
        threshold = difference.abs().flatten().quantile(0.7)
        kept = torch.where(difference.abs() > threshold, difference - threshold * difference.sign(), 0.0)
        guided = negative + CFG * kept
        if step < 3:  # pulled from 0.6 of five steps on
            return guided
        changed = torch.zeros_like(kept, dtype=torch.bool)
        for i, j, k, m in (kept != 0).nonzero():
            changed[i, j, max(k - 1, 0) : k + 2, max(m - 1, 0) : m + 2] = True
        denoised = x - sigma * guided
        denoised = torch.where(changed, denoised, denoised + 0.3 * (image - denoised))
        return (x - denoised) / sigma

    (model,) = execute(ProximalGuidance, model=tiny.model, trajectory=tiny.trajectory, pull=0.3)
    assert distance(tiny.sample(model), plain_loop(tiny, combine)) < 1e-4
    assert distance(tiny.sample(tiny.model), tiny.sample(model)) > 1e-2


def test_proximal_guidance_at_its_ends(tiny: Tiny) -> None:
    plain = tiny.sample(tiny.model)
    (off,) = execute(ProximalGuidance, model=tiny.model, quantile=0.0)
    assert torch.equal(tiny.sample(off), plain)
    rule = Proximal(1.0, 1.0, 0.0)
    assert (
        distance(tiny.sample(attach_rule(tiny.model, rule, None)), tiny.sample(tiny.model, tiny.negative, cfg=1.0))
        < 1e-5
    )
    pulled = attach_rule(tiny.model, rule, tiny.trajectory)
    image = tiny.model.model.process_latent_out(tiny.trajectory.states[-1])
    sigmas = torch.cat([tiny.sigmas[:-1], torch.zeros(1)])
    assert distance(tiny.sample(pulled, sigmas=sigmas), image) < 1e-5
    assert torch.equal(tiny.sample(pulled, cfg=1.0), tiny.sample(tiny.model, cfg=1.0))


def test_each_image_of_a_batch_has_its_own_threshold() -> None:
    tiny = Tiny(batch=2)
    rule = Proximal(0.6, 0.5, 0.0)
    result = tiny.sample(attach_rule(tiny.model, rule, tiny.trajectory))
    for i in range(2):
        trajectory = tiny.trajectory._replace(states=tiny.trajectory.states[:, i : i + 1])
        alone = tiny.sample(attach_rule(tiny.model, rule, trajectory), noise=tiny.noise[i : i + 1])
        assert distance(result[i : i + 1], alone) < 1e-4


def test_proximal_guidance_refuses_other_images(tiny: Tiny) -> None:
    large = torch.zeros(1, 4, 16, 16)
    other = invert(tiny.model, Guidance(tiny.source, None, 1.0), large, tiny.sigmas)
    with pytest.raises(ValueError, match=r"Proximal Guidance got a trajectory of shape \[1, 4, 16, 16\]"):
        tiny.sample(attach_rule(tiny.model, Proximal(0.7, 0.1, 0.0), other))
    with pytest.raises(ValueError, match="made with another model"):
        execute(ProximalGuidance, model=tiny_model(seed=1), trajectory=tiny.trajectory)


def test_models_with_changed_guidance_are_not_inverted(tiny: Tiny) -> None:
    model: ModelPatcher = attach_rule(tiny.model, Proximal(0.7, 0.1, 0.0), None)
    with pytest.raises(ValueError, match="carries another node's guidance"):
        invert(model, Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas)
