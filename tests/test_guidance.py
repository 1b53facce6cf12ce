"""Negative Prompt Guidance and Proximal Guidance: their formulas in float64, their ends, and edits beside them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import comfy.samplers
import pytest
import torch
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_cfg import CFGNorm, CFGZeroStar
from comfy_extras.nodes_custom_sampler import CFGOverride, Guider_Basic, Guider_DualCFG, SamplerSASolver
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_eps import EpsilonScaling, TemporalScoreRescaling
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_fresca import FreSca
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_lumina2 import RenormCFG
from comfy_extras.nodes_mahiro import Mahiro
from comfy_extras.nodes_model_advanced import RescaleCFG
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import PerpNeg
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_slg import SkipLayerGuidanceDiTSimple
from comfy_extras.nodes_tcfg import TCFG
from torch import Tensor

from palimpsest.attention.local_blend import LocalBlend
from palimpsest.attention.p2p import Window
from palimpsest.attention.pnp import PlugAndPlay
from palimpsest.guidance.cross_attention import CrossAttentionGuidance
from palimpsest.guidance.negative_prompt import CONSTANT, EXPONENTIAL, LINEAR, NPI, Mixture
from palimpsest.guidance.proximal import INVERSION, RECONSTRUCTION, Proximal
from palimpsest.host.branch.guide import attach_guide
from palimpsest.host.branch.guided import attach_rule
from palimpsest.host.branch.negatives import attach_mixture
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.host.files.trajectory import Trajectory
from palimpsest.host.run.model import noise_latent
from palimpsest.host.run.schedule import step_of
from palimpsest.host.run.timed import timed
from palimpsest.inversion.replay import invert_edict
from palimpsest.inversion.run import Guidance, invert
from palimpsest.nodes.guidance import NegativePromptGuidance, NegativePromptGuider, ProximalGuidance
from reference import classic_p2p, in_float64, swapped
from test_source import NEVER, some_mapper, split, swap
from tiny import Tiny, conditioning, execute, rows_of, tiny_model

EMPTY = conditioning(7)
CFG = 4.0
PROXIMAL = Proximal(0.4, 1.0, 0.6, INVERSION)

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
def test_it_stands_beside_prompt_to_prompt_in_either_order(
    tiny: Tiny, no_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapper, mixture = some_mapper(), Mixture(0.6, CONSTANT)
    edit = swap(mapper, Window(0, 0.8), Window(0, 0.4))
    tiny.empty = EMPTY
    theirs = tiny.model.model.process_latent_out(classic_p2p(tiny, swapped(mapper, 4), 2, CFG, share=0.6))
    if no_memory:
        split(monkeypatch, tiny)
    for model in (
        attach(attach_mixture(tiny.model, EMPTY, mixture), tiny.trajectory, edit),
        attach_mixture(attach(tiny.model, tiny.trajectory, edit), EMPTY, mixture),
    ):
        assert distance(tiny.sample(model), theirs) < 1e-4


def test_edits_of_all_rows_reach_the_empty_one_too(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the negative itself for the empty prompt a mixture is no other than the negative alone."""
    pnp = PlugAndPlay((("output", 1),), (("output", 1), ("output", 2)), 0.8, 0.6)
    expected = tiny.sample(attach(tiny.model, tiny.trajectory, pnp))
    mixed = attach(attach_mixture(tiny.model, tiny.negative, Mixture(0.6, CONSTANT)), tiny.trajectory, pnp)
    assert distance(tiny.sample(mixed), expected) < 1e-5
    split(monkeypatch, tiny)
    assert distance(tiny.sample(mixed), expected) < 1e-5


def test_everything_on_one_model_in_any_order(tiny: Tiny) -> None:
    """P2P, Local Blend by a mask, gradients on attention, a mixed negative, and a negative for each step."""
    mask = torch.zeros(1, 8, 8)
    mask[:, :, 4:] = 1
    blend = LocalBlend(None, 0, None, 0.3, 0.3, 0.2, 0, mask, False)
    negatives = torch.stack([conditioning(20 + step)[0][0] for step in range(tiny.steps)])
    percent_to_sigma = tiny.model.get_model_object("model_sampling").percent_to_sigma
    negative = timed(negatives, {}, tiny.sigmas, percent_to_sigma)
    parts: dict[str, Callable[[ModelPatcher], ModelPatcher]] = {
        "p2p": lambda model: attach(model, tiny.trajectory, swap(some_mapper(), self_=NEVER)),
        "blend": lambda model: attach_blend(model, tiny.trajectory, blend),
        "guide": lambda model: attach_guide(model, tiny.trajectory, CrossAttentionGuidance(2.0, 1.0, 64), True),
        "mixture": lambda model: attach_mixture(model, EMPTY, Mixture(0.5, CONSTANT)),
    }

    def sampled(names: Iterable[str], negative: list = negative) -> Tensor:
        model = tiny.model
        for name in names:
            model = parts[name](model)
        return tiny.sample(model, negative=negative)

    together = sampled(parts)
    for order in (("guide", "mixture", "blend", "p2p"), ("mixture", "blend", "p2p", "guide")):
        assert distance(sampled(order), together) < 1e-4
    for name in parts:
        assert distance(sampled([other for other in parts if other != name]), together) > 1e-3, name
    assert distance(sampled(parts, tiny.negative), together) > 1e-3


def test_a_call_between_or_behind_the_steps_belongs_to_one(tiny: Tiny) -> None:
    sigmas = tiny.sigmas
    assert [step_of(sigmas, float(sigma)) for sigma in sigmas] == [0, 1, 2, 3, 4, 4]
    assert step_of(sigmas, float(sigmas[1] + sigmas[2]) / 2) == 2
    asked: list[tuple[int, float]] = []

    class Noted(Mixture):
        def at(self, step: int, steps: int) -> float:
            asked.append((step, share := super().at(step, steps)))
            return share

    tiny.sample(attach_mixture(tiny.model, EMPTY, Noted(1.0, LINEAR)), sampler="heun")
    assert {step for step, _ in asked} == {0, 1, 2, 3, 4}
    assert all(0 <= share <= 1 for _, share in asked)


def test_with_a_trajectory_the_schedule_is_that_of_the_whole_run(tiny: Tiny) -> None:
    model = attach_mixture(tiny.model, EMPTY, Mixture(1.0, LINEAR), tiny.trajectory)
    model = attach_rule(model, Proximal(0.7, 0.5, 0.6, INVERSION), tiny.trajectory)
    halfway = tiny.sample(model, sigmas=tiny.sigmas[:3])
    assert distance(tiny.sample(model, sigmas=tiny.sigmas[2:], noise=halfway), tiny.sample(model)) < 1e-5


def test_the_guider_equals_the_patch(tiny: Tiny) -> None:
    settings = {"model": tiny.model, "empty": EMPTY, "preset": "Plug-and-Play, generated image"}
    (model,) = execute(NegativePromptGuidance, **settings)
    prompts = {"positive": tiny.target, "negative": tiny.negative}
    (guider,) = execute(NegativePromptGuider, **settings, **prompts, cfg=CFG)
    euler = comfy.samplers.sampler_object("euler")
    result = guider.sample(torch.zeros_like(tiny.noise), tiny.noise, euler, tiny.sigmas, disable_pbar=True, seed=0)
    assert torch.equal(result, tiny.sample(model))


@pytest.mark.parametrize(
    ("empty", "said"),
    [
        ([[EMPTY[0][0], {"start_percent": 0.5}]], "carries 'start_percent'"),
        ([[EMPTY[0][0], {"area": (4, 4, 0, 0)}]], "carries 'area'"),
        ([], "has 0 entries"),
        ([[torch.zeros(1, 77, 32), {}]], "has embeddings of 32 channels"),
    ],
)
def test_other_than_a_plain_empty_prompt_is_refused(tiny: Tiny, empty: list, said: str) -> None:
    with pytest.raises(ValueError, match=f"The empty prompt of Negative Prompt Guidance {said}"):
        tiny.sample(attach_mixture(tiny.model, empty, Mixture(0.5, CONSTANT)))


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


def authors_loop(tiny: Tiny, quantile: float, pull: float, first: int, inversion: bool) -> Tensor:
    """DDIM in z in float64 as in the authors' code, with a row for the source, whose difference is 0."""
    _, predict = in_float64(tiny.model)
    sigmas, states = tiny.sigmas.double(), tiny.trajectory.states.double()
    signals, noises = (1 + sigmas**2).rsqrt(), sigmas * (1 + sigmas**2).rsqrt()
    z = states[0] * signals[0]
    for i in range(tiny.steps):
        negative = predict(z / signals[i], sigmas[i], tiny.negative, {})
        difference = predict(z / signals[i], sigmas[i], tiny.target, {}) - negative
        threshold = torch.stack([torch.zeros_like(difference), difference]).abs().quantile(quantile)
        difference -= difference.clamp(-threshold, threshold)
        changed = torch.zeros_like(difference, dtype=torch.bool)
        for at in (difference.abs() > threshold).nonzero().tolist():
            row, column = (slice(max(side - 1, 0), side + 2) for side in at[2:])
            changed[at[0], at[1], row, column] = True
        way = pull * ~changed if i >= first else 0.0
        eps = negative + CFG * difference
        estimate = (z - noises[i] * eps) / signals[i]
        if not inversion:
            estimate = estimate - way * (estimate - states[-1])
        z = signals[i + 1] * estimate + noises[i + 1] * eps
        if inversion:
            z = z - way * (z - states[i + 1] * signals[i + 1])
    return tiny.model.model.process_latent_out(z / signals[-1])


def as_here(quantile: float, values: int) -> float:
    """The quantile of so many values that, beside as many zeros, is theirs."""
    return (quantile * (2 * values - 1) - values) / (values - 1)


def test_the_authors_quantiles_are_said_right() -> None:
    assert as_here(0.7, 4 * 64 * 64) == pytest.approx(0.4, abs=1e-4)
    assert as_here(0.75, 4 * 64 * 64) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(("towards", "pull"), [(INVERSION, 1.0), (INVERSION, 0.1), (RECONSTRUCTION, 0.1)])
@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_proximal_guidance_is_the_authors(tiny: Tiny, towards: str, pull: float, sampler: str) -> None:
    quantile = as_here(0.7, tiny.noise.numel())
    inputs = {"model": tiny.model, "quantile": quantile, "trajectory": tiny.trajectory}
    (model,) = execute(ProximalGuidance, **inputs, pull=pull, pull_to=towards)
    result = tiny.sample(model, sampler=sampler)
    assert distance(result, authors_loop(tiny, 0.7, pull, 3, towards == INVERSION)) < 1e-4
    (unpulled,) = execute(ProximalGuidance, **inputs, pull=0.0)
    assert distance(tiny.sample(unpulled), authors_loop(tiny, 0.7, 0.0, 3, True)) < 1e-4
    assert distance(result, tiny.sample(unpulled)) > 1e-2
    assert distance(tiny.sample(tiny.model), tiny.sample(unpulled)) > 1e-2


def test_proximal_guidance_has_the_authors_defaults(tiny: Tiny) -> None:
    """Those of their examples: half of the values are the source's zeros, and all that is unchanged is inverted."""
    (model,) = execute(ProximalGuidance, model=tiny.model, trajectory=tiny.trajectory)
    assert torch.equal(tiny.sample(model), tiny.sample(attach_rule(tiny.model, PROXIMAL, tiny.trajectory)))


def test_proximal_guidance_at_its_ends(tiny: Tiny) -> None:
    plain = tiny.sample(tiny.model)
    (off,) = execute(ProximalGuidance, model=tiny.model, quantile=0.0)
    assert torch.equal(tiny.sample(off), plain)
    rule = Proximal(1.0, 1.0, 0.0, RECONSTRUCTION)
    assert (
        distance(tiny.sample(attach_rule(tiny.model, rule, None)), tiny.sample(tiny.model, tiny.negative, cfg=1.0))
        < 1e-5
    )
    image = tiny.model.model.process_latent_out(tiny.trajectory.states[-1])
    assert (
        distance(tiny.sample(attach_rule(tiny.model, rule._replace(towards=INVERSION), tiny.trajectory)), image) < 1e-5
    )
    sigmas = torch.cat([tiny.sigmas[:-1], torch.zeros(1)])
    to_zero = invert(tiny.model, Guidance(tiny.source, None, 1.0), tiny.image, sigmas)
    pulled = attach_rule(tiny.model, rule, to_zero)
    assert distance(tiny.sample(pulled, sigmas=sigmas), image) < 1e-5
    assert torch.equal(tiny.sample(pulled, cfg=1.0, sigmas=sigmas), tiny.sample(tiny.model, cfg=1.0, sigmas=sigmas))


def test_each_image_of_a_batch_has_its_own_threshold() -> None:
    """Without a pull, whose mask is all or nothing: where a batch rounds otherwise, a value at its edge falls aside."""
    tiny = Tiny(batch=2)
    rule = Proximal(0.6, 0.0, 0.0, INVERSION)
    scale = torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    difference = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * scale
    assert torch.equal(rule.unchanged(difference), torch.cat([rule.unchanged(one[None]) for one in difference]))
    result = tiny.sample(attach_rule(tiny.model, rule, tiny.trajectory))
    for i in range(2):
        trajectory = tiny.trajectory._replace(states=tiny.trajectory.states[:, i : i + 1])
        alone = tiny.sample(attach_rule(tiny.model, rule, trajectory), noise=tiny.noise[i : i + 1])
        assert distance(result[i : i + 1], alone) < 1e-4


def test_a_pull_belongs_to_the_end_of_its_step() -> None:
    """Before what other nodes do to the next one: gradients, and Local Blend, whose source is exact."""
    tiny = Tiny(steps=2)
    mask = torch.zeros(1, 8, 8)
    mask[:, :, 4:] = 1
    blend = LocalBlend(None, 0, None, 0.3, 0.3, 0.2, 0, mask, False)
    parts: dict[str, Callable[[ModelPatcher], ModelPatcher]] = {
        "proximal": lambda model: attach_rule(model, PROXIMAL._replace(start=0.0), tiny.trajectory),
        "blend": lambda model: attach_blend(model, tiny.trajectory, blend),
        "guide": lambda model: attach_guide(model, tiny.trajectory, CrossAttentionGuidance(2.0, 1.0, 64), True),
    }
    results = []
    for order in itertools.permutations(parts):
        model = tiny.model
        for name in order:
            model = parts[name](model)
        results.append(tiny.sample(model))
    assert all(torch.equal(result, results[0]) for result in results)
    image = tiny.model.model.process_latent_out(tiny.trajectory.states[-1])
    assert torch.equal(results[0][..., :4], image[..., :4])
    assert distance(tiny.sample(parts["guide"](parts["blend"](tiny.model))), results[0]) > 1e-3


def test_every_call_of_a_step_begins_at_its_pulled_state(tiny: Tiny) -> None:
    """heun asks twice at a sigma, both times where the step before it led to."""
    seen: list[tuple[float, Tensor]] = []

    def watch(executor, x: Tensor, timestep: Tensor, *args, **kwargs):
        seen.append((float(timestep[0]), x.clone()))
        return executor(x, timestep, *args, **kwargs)

    model = attach_rule(tiny.model, Proximal(1.0, 1.0, 0.0, INVERSION), tiny.trajectory)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", watch)
    tiny.sample(model, sampler="heun")
    assert len(seen) == 2 * tiny.steps
    for sigma, x in seen:
        assert distance(x, tiny.trajectory.states[tiny.trajectory.index(sigma)]) < 1e-5


@pytest.mark.parametrize("first", [True, False])
def test_calls_that_another_pack_skips_keep_the_last_mask(tiny: Tiny, first: bool) -> None:
    def skipping(model: ModelPatcher) -> ModelPatcher:
        kept: list[Tensor] = []

        def skip(executor, *args, **kwargs):
            if len(kept) != 2:
                kept.append(executor(*args, **kwargs))
                return kept[-1]
            kept.append(kept[-1])
            return kept[-1]

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "lazy", skip)
        return model

    def proximal(model: ModelPatcher) -> ModelPatcher:
        return attach_rule(model, Proximal(1.0, 1.0, 0.0, INVERSION), tiny.trajectory)

    model = proximal(skipping(tiny.model)) if first else skipping(proximal(tiny.model))
    image = tiny.model.model.process_latent_out(tiny.trajectory.states[-1])
    assert distance(tiny.sample(model), image) < 1e-5


def test_proximal_guidance_refuses_runs_that_do_not_follow_its_trajectory(tiny: Tiny) -> None:
    model = attach_rule(tiny.model, PROXIMAL, tiny.trajectory)
    large = invert(tiny.model, Guidance(tiny.source, None, 1.0), torch.zeros(1, 4, 16, 16), tiny.sigmas)
    with pytest.raises(ValueError, match=r"latent has shape \[1, 4, 8, 8\] but the trajectory's is \[1, 4, 16, 16\]"):
        tiny.sample(attach_rule(tiny.model, PROXIMAL, large))
    with pytest.raises(ValueError, match="schedule has sigma"):
        tiny.sample(model, sigmas=tiny.sigmas * 0.9)
    for sampler in ("uni_pc", SamplerSASolver.execute(tiny.model, 0, 0.2, 0.8, 1.0, 3, 4, False, False)[0]):
        with pytest.raises(ValueError, match="Proximal Guidance cannot change the latent inside .* '(uni|sa)_"):
            tiny.sample(model, sampler=sampler)
    with pytest.raises(ValueError, match="adds fresh noise"):
        tiny.sample(model, sampler="euler_ancestral")
    with pytest.raises(ValueError, match="made with another model"):
        execute(ProximalGuidance, model=tiny_model(seed=1), trajectory=tiny.trajectory)
    trajectory, exact = invert_edict(tiny.model, Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas, 0.93)
    model, noise = attach_rule(tiny.model, PROXIMAL, trajectory), noise_latent(tiny.model, trajectory)
    with pytest.raises(ValueError, match="Proximal Guidance knows one state of the source a step"):
        tiny.sample(model, sampler=exact, noise=noise)


@pytest.mark.parametrize("found", ["sampler_pre_cfg_function", "Negative Prompt Guidance"])
def test_models_with_changed_guidance_are_not_inverted(tiny: Tiny, found: str) -> None:
    proximal = attach_rule(tiny.model, PROXIMAL, None)
    mixed = attach_mixture(tiny.model, EMPTY, Mixture(0.5, CONSTANT))
    with pytest.raises(ValueError, match=f"carries another node's guidance .*{found}"):
        invert(mixed if "Prompt" in found else proximal, Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas)


GUIDING: dict[str, Callable[[ModelPatcher], ModelPatcher]] = {
    "CFGOverride": lambda model: CFGOverride.execute(model, 4.0, 0.0, 1.0).result[0],
    "APG": lambda model: APG.execute(model, 1.0, 5.0, 0.0).result[0],
    "CFGNorm": lambda model: CFGNorm.execute(model, 0.5).result[0],
    "CFGZeroStar": lambda model: CFGZeroStar.execute(model).result[0],
    "EpsilonScaling": lambda model: EpsilonScaling.execute(model, 1.005).result[0],
    "FreSca": lambda model: FreSca.execute(model, 1.0, 1.25, 20).result[0],
    "Mahiro": lambda model: Mahiro.execute(model).result[0],
    "PerpNeg": lambda model: PerpNeg.execute(model, EMPTY, 1.0).result[0],
    "PerturbedAttentionGuidance": lambda model: PerturbedAttentionGuidance.execute(model, 3.0).result[0],
    "RenormCFG": lambda model: RenormCFG.execute(model, 100.0, 1.0).result[0],
    "RescaleCFG": lambda model: RescaleCFG().patch(model, 0.7)[0],
    "SelfAttentionGuidance": lambda model: SelfAttentionGuidance.execute(model, 0.5, 2.0).result[0],
    "SkipLayerGuidanceDiTSimple": lambda model: SkipLayerGuidanceDiTSimple.execute(model, 0.0, 1.0, "1", "").result[0],
    "TCFG": lambda model: TCFG.execute(model).result[0],
    "TemporalScoreRescaling": lambda model: TemporalScoreRescaling.execute(model, 0.95, 1.0).result[0],
}
HARMLESS: dict[str, Callable[[ModelPatcher], ModelPatcher]] = {
    "DifferentialDiffusion": lambda model: DifferentialDiffusion.execute(model).result[0],
    "FreeU_V2": lambda model: FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2).result[0],
    "HyperTile": lambda model: HyperTile.execute(model, 32, 1, 0, False)[0],
    "PatchModelAddDownscale": lambda model: PatchModelAddDownscale.execute(
        model, 1, 2.0, 0.0, 0.35, True, "bicubic", "bicubic"
    ).result[0],
}


@pytest.mark.parametrize("name", GUIDING)
def test_a_node_of_the_host_that_guides_is_not_inverted(tiny: Tiny, name: str) -> None:
    model, rows = rows_of(GUIDING[name](tiny.model))
    with pytest.raises(ValueError, match="carries another node's guidance"):
        invert(model, Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas)
    assert not rows


@pytest.mark.parametrize("name", HARMLESS)
def test_a_node_of_the_host_that_guides_nothing_is_inverted(tiny: Tiny, name: str) -> None:
    assert isinstance(
        invert(HARMLESS[name](tiny.model), Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas), Trajectory
    )


def test_a_wrapper_among_the_options_guides_as_one_of_the_model(tiny: Tiny) -> None:
    model = tiny.model.clone()
    add_wrapper(WrappersMP.PREDICT_NOISE, lambda executor, *args: executor(*args), model.model_options, True)
    with pytest.raises(ValueError, match=r"another node's guidance \(a predict_noise wrapper\)"):
        invert(model, Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas)


def test_proximal_guidance_refuses_what_it_cannot_reach(tiny: Tiny) -> None:
    model = attach_rule(tiny.model, PROXIMAL, None)
    with pytest.raises(ValueError, match="already carries a Proximal Guidance"):
        attach_rule(model, PROXIMAL, None)
    guider = Guider_DualCFG(model)
    guider.set_conds(tiny.target, tiny.source, tiny.negative)
    guider.set_cfg(4.0, 2.0)
    euler = comfy.samplers.sampler_object("euler")
    with pytest.raises(ValueError, match="Proximal Guidance has no effect in the guider Guider_DualCFG"):
        guider.sample(torch.zeros_like(tiny.noise), tiny.noise, euler, tiny.sigmas, disable_pbar=True, seed=0)
