"""Nodes whose work another run cannot repeat: refused where an image is to come back, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM, ModelSamplingDiscrete
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_tomesd import TomePatchModel
from torch import Tensor

from palimpsest.guidance.cross_attention import CrossAttentionGuidance
from palimpsest.guidance.negative_prompt import CONSTANT, LINEAR, Mixture
from palimpsest.host.branch.guide import attach_guide
from palimpsest.host.branch.negatives import attach_mixture
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.host.run.refusals import check_same_model, check_whole_schedule
from palimpsest.inversion.ddim import leading_sigmas
from palimpsest.inversion.null_text import Settings, null_text
from palimpsest.inversion.replay import invert_edict, invert_edit_friendly, invert_obelm
from palimpsest.inversion.run import Guidance, invert, record
from test_ddim import relative
from test_local_blend import blend
from test_source import some_mapper, split, swap
from tiny import Tiny, conditioning, rows_of

EMPTY = conditioning(7)


def merging(model: ModelPatcher) -> ModelPatcher:
    return TomePatchModel.execute(model, 0.5)[0]


def normalized(model: ModelPatcher) -> ModelPatcher:
    return NAGuidance.execute(model, 5.0, 0.5, 1.5)[0]


def guidance(tiny: Tiny, cfg: float = 3.0) -> Guidance:
    return Guidance(tiny.source, tiny.negative, cfg)


def edict(tiny: Tiny, model: ModelPatcher) -> tuple:
    return invert_edict(model, guidance(tiny), tiny.image, tiny.sigmas, 0.93)


def edit_friendly(tiny: Tiny, model: ModelPatcher) -> tuple:
    return invert_edit_friendly(model, guidance(tiny), tiny.image, tiny.sigmas, 1.0, 0)


def o_belm(tiny: Tiny, model: ModelPatcher) -> tuple:
    return invert_obelm(model, guidance(tiny), tiny.image, tiny.sigmas)


def recorded(tiny: Tiny, model: ModelPatcher) -> tuple:
    euler, noise = comfy.samplers.sampler_object("euler"), torch.randn_like(tiny.noise)
    return record(model, guidance(tiny), euler, tiny.sigmas, noise, torch.zeros_like(noise), 0)


def ddim(tiny: Tiny, model: ModelPatcher) -> tuple:
    return (invert(model, guidance(tiny), tiny.image, tiny.sigmas),)


def optimised(tiny: Tiny, model: ModelPatcher) -> tuple:
    return null_text(model, tiny.trajectory, EMPTY, Settings(cfg=3.0, inner_steps=1), False)


EXACT = {
    "EDICT Inversion": edict,
    "Edit Friendly Inversion": edit_friendly,
    "OBELM Inversion": o_belm,
    "Null Text Inversion": optimised,
}
Make = Callable[[Tiny, ModelPatcher], tuple]


@pytest.mark.parametrize("node", EXACT)
def test_exact_inversions_refuse_what_is_drawn_at_random(tiny: Tiny, node: str) -> None:
    with pytest.raises(ValueError, match=rf"{node} needs a MODEL that repeats its answers, .* are \d+\.\d% apart"):
        EXACT[node](tiny, merging(tiny.model))


@pytest.mark.parametrize("make", [edict, edit_friendly, o_belm])
def test_their_samplers_refuse_it_as_well(tiny: Tiny, make: Make) -> None:
    """At the price of one call; without Token Merging the image comes back."""
    model, rows = rows_of(tiny.model)
    trajectory, sampler = make(tiny, model)
    calls = len(rows)
    run = {"sampler": sampler, "noise": tiny.model.model.process_latent_out(trajectory.states[0]), "cfg": 3.0}
    assert relative(tiny.sample(model, tiny.source, **run), tiny.image) < 1e-6
    each = trajectory.steps * (2 if make is edict else 1)
    kept = 1 if make is o_belm else 0  # where its first step leads, the inversion knows
    assert (calls, len(rows) - calls) == (each + 2, each + 1 - kept)  # an inversion makes sure of unmixed prompts too
    with pytest.raises(ValueError, match="The sampler of .* needs a MODEL that repeats its answers"):
        tiny.sample(merging(tiny.model), **run)


def test_edits_and_recordings_run_beside_it(tiny: Tiny) -> None:
    for trajectory, *_ in (recorded(tiny, merging(tiny.model)), ddim(tiny, merging(tiny.model))):
        assert torch.isfinite(trajectory.states).all()
    edited = attach(merging(tiny.model), tiny.trajectory, swap(some_mapper()))
    assert torch.isfinite(tiny.sample(edited)).all()


@pytest.mark.parametrize("make", [ddim, edict, edit_friendly, o_belm, recorded, optimised])
def test_what_mixes_prompts_leaves_no_trajectory(tiny: Tiny, make: Make) -> None:
    """An edit would not find the source's attention again: a recorded run, edited to itself, was 0.19 off."""
    with pytest.raises(ValueError, match="mixes what the prompts of a call attend to, .* an edit runs the source's"):
        make(tiny, normalized(tiny.model))


@pytest.mark.parametrize("no_memory", [False, True])
def test_prompts_that_stay_apart_are_no_mixture(tiny: Tiny, no_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked by one call more in the run; a split call leaves nothing to mix, and cfg 1 no second prompt."""
    model, rows = rows_of(tiny.model)
    recorded(tiny, model)
    assert rows == [2] * 6
    unguided = invert(normalized(tiny.model), Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas)
    assert torch.equal(unguided.states, tiny.trajectory.states)
    split(monkeypatch, tiny)
    recorded(tiny, normalized(tiny.model))


def test_two_latents_refuse_what_mixes_prompts(tiny: Tiny) -> None:
    """It reaches the target only beside the negative, and there it was 0.58 off."""

    def guided(two_latents: bool, model: ModelPatcher) -> Tensor:
        guide = CrossAttentionGuidance(1e-4, 1.0, 64, two_latents)
        return tiny.sample(attach_guide(model, tiny.trajectory, guide, False))

    assert relative(guided(False, normalized(tiny.model)), tiny.sample(normalized(tiny.model))) < 1e-3
    assert relative(guided(True, tiny.model), tiny.sample(tiny.model)) < 1e-3
    with pytest.raises(ValueError, match="with two latents runs the target's alone: set latents to"):
        guided(True, normalized(tiny.model))


def discrete(sampling: str, zsnr: bool) -> Callable[[ModelPatcher], ModelPatcher]:
    return lambda model: ModelSamplingDiscrete().patch(model, sampling, zsnr)[0]


def continuous(sampling: str) -> Callable[[ModelPatcher], ModelPatcher]:
    return lambda model: ModelSamplingContinuousEDM().patch(model, sampling, 14.6146, 0.0291672)[0]


OTHER_SAMPLING = {
    "zsnr": (discrete("eps", True), "This MODEL's sampling .* is not that of the trajectory"),
    "lcm": (discrete("lcm", False), "This MODEL's sampling .* is not that of the trajectory"),
    "v": (discrete("v_prediction", False), "This MODEL's sampling .* is not that of the trajectory"),
    "x0": (discrete("x0", False), "predicts neither noise .* remove nodes that change its sampling"),
    "EDM eps": (continuous("eps"), "This MODEL's sampling .* is not that of the trajectory"),
    "EDM": (continuous("edm"), "predicts neither noise .* remove nodes that change its sampling"),
}


@pytest.mark.parametrize("name", OTHER_SAMPLING)
def test_a_trajectory_belongs_to_its_sampling(tiny: Tiny, name: str) -> None:
    """Behind the edit, where it made a difference of 0.07 to 1, and before it."""
    node, sentence = OTHER_SAMPLING[name]
    model, rows = rows_of(tiny.model)
    whole = blend(phrases=None, user=torch.ones(1, 8, 8))
    for edited in (
        attach(model, tiny.trajectory, swap(some_mapper())),
        attach_blend(model, tiny.trajectory, whole),
        attach_guide(model, tiny.trajectory, CrossAttentionGuidance(0.1, 1.0, 64), False),
    ):
        with pytest.raises(ValueError, match=sentence):
            tiny.sample(node(edited))
    with pytest.raises(ValueError, match=sentence):
        check_same_model(node(model), tiny.trajectory)
    assert rows == []


def test_the_same_sampling_written_out_is_the_same(tiny: Tiny) -> None:
    edited = attach(tiny.model, tiny.trajectory, swap(some_mapper()))
    assert torch.equal(tiny.sample(discrete("eps", False)(edited)), tiny.sample(edited))
    other = discrete("eps", True)(tiny.model)
    sigmas = tiny.sigmas
    trajectory = invert(other, Guidance(tiny.source, None, 1.0), tiny.image, sigmas)
    noise = tiny.model.model.process_latent_out(trajectory.states[0])
    assert torch.isfinite(tiny.sample(attach(other, trajectory, swap(some_mapper())), noise=noise)).all()


def test_a_schedule_is_not_begun_anew_in_a_part_of_a_run(tiny: Tiny) -> None:
    """Begun anew it was 0.12 off; with the trajectory the parts are the whole."""
    tiny = Tiny(steps=8)
    mixed = attach_mixture(tiny.model, EMPTY, Mixture(1.0, LINEAR))
    with pytest.raises(ValueError, match=r"but this run stops at sigma 1\.\d+, in the middle of a longer one: connect"):
        tiny.sample(mixed, sigmas=tiny.sigmas[:5])
    with pytest.raises(
        ValueError, match=r"but this run begins at sigma 1\.\d+, in the middle of a longer one: connect"
    ):
        tiny.sample(mixed, sigmas=tiny.sigmas[4:])
    for model in (
        attach_mixture(tiny.model, EMPTY, Mixture(1.0, LINEAR), tiny.trajectory),
        attach_mixture(tiny.model, EMPTY, Mixture(0.5, CONSTANT)),
    ):
        half = tiny.sample(model, sigmas=tiny.sigmas[:5])
        torch.testing.assert_close(
            tiny.sample(model, sigmas=tiny.sigmas[4:], noise=half), tiny.sample(model), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("steps", [2, 3, 7, 20, 50])
@pytest.mark.parametrize("scheduler", ["leading", "normal", "karras", "ddim_uniform", "sgm_uniform", "beta"])
def test_whole_schedules_are_whole(tiny: Tiny, steps: int, scheduler: str) -> None:
    """And an image that is noised itself begins where it likes."""
    model_sampling = tiny.model.get_model_object("model_sampling")
    if scheduler == "leading":
        sigmas = leading_sigmas(model_sampling.sigmas, steps)
    else:
        sigmas = comfy.samplers.calculate_sigmas(model_sampling, scheduler, steps)
    check_whole_schedule(sigmas, False, tiny.model)
    check_whole_schedule(sigmas[steps // 2 :], True, tiny.model)
    if steps > 4:
        for part in (sigmas[: steps // 2], sigmas[steps // 2 :]):
            with pytest.raises(ValueError, match="in the middle of a longer one"):
                check_whole_schedule(part, False, tiny.model)
