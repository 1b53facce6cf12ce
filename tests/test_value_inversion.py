"""Value inversion: against the algorithm written out in float64, and what its values are worth in the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.samplers
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import ModelType
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from palimpsest.attention.alignment import Carry
from palimpsest.attention.p2p import NEVER, PromptToPrompt, Window
from palimpsest.benchmarks.edits import encode
from palimpsest.demo import scenes
from palimpsest.host.branch.source import attach
from palimpsest.host.files.trajectory import VALUES, Trajectory
from palimpsest.host.unet.gradients import gradients
from palimpsest.inversion import value_inversion as values_module
from palimpsest.inversion.ddim import leading_sigmas
from palimpsest.inversion.run import Guidance, invert, record, resample
from palimpsest.inversion.value_inversion import Settings, value_inversion
from palimpsest.nodes.cross_attention import CrossAttentionGuidanceNode
from palimpsest.nodes.guidance import NegativePromptGuidance
from palimpsest.nodes.null_text import NullTextInversion
from palimpsest.nodes.p2p import P2PAttentionController
from palimpsest.nodes.prompt import PromptEdit
from palimpsest.nodes.store import RecordAttention
from palimpsest.nodes.value_inversion import ValueInversion
from reference import classic_run, explicit, in_float64
from test_alignment import edit_of
from test_null_text import stopping
from tiny import Tiny, conditioning, execute, rows_of, tiny_model

EPS, V = ModelType.EPS, ModelType.V_PREDICTION
QUICK = Settings(inner_steps=2, map_side=4)
EACH = 2 + QUICK.inner_steps + 2  # evaluations of a first step: negative, source, updates, last look and the step
BEFORE = 3  # calls that tell an unfinished run, and a MODEL that repeats its answers and mixes no prompts
Eps = Callable[[Tensor, Tensor, list, dict], Tensor]


@pytest.fixture(autouse=True)
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return tmp_path / "palimpsest"


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def sampled(tiny: Tiny, cfg: float) -> tuple[Trajectory, Tensor]:
    """What the host's plain sampler passes through, and what it returns."""
    guidance, nothing = Guidance(tiny.source, tiny.negative, cfg), torch.zeros_like(tiny.noise)
    return record(tiny.model, guidance, comfy.samplers.sampler_object("euler"), tiny.sigmas, nothing, tiny.noise, 0)


# --- the algorithm ---------------------------------------------------------------------------------------------------


def viewed(eps: Eps, side: int, x: Tensor, sigma: Tensor, prompt: Tensor, values: Tensor) -> tuple[Tensor, list]:
    """eps by a prompt's keys and other values, and the maps [b, heads, positions, tokens] of layers of one size."""
    seen: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        q, k, v = (t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
        maps = explicit(q, k)
        if q.shape[2] == side**2:
            seen.append(maps)
        return (maps @ v).transpose(1, 2).flatten(2)

    blocks = [(name, i) for name in ("input", "middle", "output") for i in range(12)]
    patches = {"attn2_patch": [lambda q, k, v, options: (q, k, values)]}
    options = {"patches": patches, "patches_replace": {"attn2": dict.fromkeys(blocks, attend)}}
    return eps(x, sigma, [[prompt, {}]], options), seen


def objective(
    tiny: Tiny, eps: Eps, step: int, x: Tensor, settings: Settings
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The loss of one image's values at a step, and the x that they lead to; in float64."""
    sigmas, pivot = tiny.sigmas.double().clone(), tiny.trajectory.states.double().clone()
    source, negative = (prompt[0][0].double().clone() for prompt in (tiny.source, tiny.negative))
    signal = (1 + sigmas**2) ** -0.5
    _, reference = viewed(eps, settings.map_side, pivot[step], sigmas[step], source, source)
    unconditional = eps(x, sigmas[step], [[negative, {}]], {})

    def loss(values: Tensor) -> tuple[Tensor, Tensor]:
        conditional, maps = viewed(eps, settings.map_side, x, sigmas[step], source, values)
        e = unconditional + settings.cfg * (conditional - unconditional)
        reached = x + (sigmas[step + 1] - sigmas[step]) * e
        reconstruction = ((reached - pivot[step + 1]) ** 2).mean() * signal[step + 1] ** 2
        apart = sum(((one - other) ** 2).mean() for one, other in zip(maps, reference, strict=True))
        return reconstruction + settings.map_weight * apart, reached

    return loss


def written_out(tiny: Tiny, settings: Settings) -> tuple[Tensor, Tensor]:
    """The algorithm for one image in float64, with Adam by hand: values and states as x."""
    with gradients():
        _, eps = in_float64(tiny.model)
        values, x = tiny.source[0][0].double().clone(), tiny.trajectory.states[0].double().clone()
        found, states = [], [x]
        for i in range(tiny.steps):
            loss_of = objective(tiny, eps, i, x, settings)
            first, second = torch.zeros_like(values), torch.zeros_like(values)
            for j in range(1, math.ceil(settings.inner_steps * math.exp(-0.1 * i)) + 1):
                values.requires_grad_()
                loss, _ = loss_of(values)
                if loss < settings.early_stop + 2e-5 * i:
                    break
                (grad,) = torch.autograd.grad(loss, values)
                first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
                rate = settings.learning_rate * (1 - i / 100)
                values = values.detach() - rate * first / (1 - 0.9**j) / ((second / (1 - 0.999**j)).sqrt() + 1e-8)
            values = values.detach()
            x = loss_of(values)[1].detach()
            found.append(values)
            states.append(x)
        return torch.stack(found), torch.stack(states)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [EPS, V])
def test_gradients_are_those_of_finite_differences(
    kind: ModelType, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole loss, its maps included, along random directions, against a float64 copy of the network."""
    tiny, generator, taken = Tiny(steps=3, model=tiny_model(kind)), torch.Generator().manual_seed(5), []
    settings, moved = QUICK._replace(map_weight=1e6), torch.randn(1, 77, 64, generator=generator)

    def take(embedding: Tensor, reach: Callable, *_: object) -> tuple[Tensor, None]:
        leaf = (embedding + moved).requires_grad_()  # at the first state the prompt's own have the pivot's maps
        _, losses = reach(leaf)
        taken.append(torch.autograd.grad(losses.sum(), leaf)[0])
        return embedding, None

    monkeypatch.setattr(values_module, "fit", take)
    value_inversion(tiny.model, tiny.trajectory, tiny.negative, settings, checkpointing)
    start, (_, eps), x = tiny.source[0][0] + moved, in_float64(tiny.model), tiny.trajectory.states[0].double()

    def along(direction: Tensor, settings: Settings) -> float:
        loss_of = objective(tiny, eps, 0, x, settings)
        ahead, behind = (loss_of(start.double() + step * direction)[0] for step in (1e-4, -1e-4))
        return float(ahead - behind) / 2e-4

    for _ in range(3):
        direction = torch.randn(start.shape, generator=generator).double()
        difference = along(direction, settings)
        assert float((taken[0] * direction).sum()) == pytest.approx(difference, rel=1e-3)
        assert along(direction, settings._replace(map_weight=0.0)) != pytest.approx(difference, rel=1e-2)


@pytest.mark.parametrize(("early_stop", "map_weight"), [(0.0, 1.0), (0.0, 1e3), (2.5, 1.0)])
@pytest.mark.parametrize("kind", [EPS, V])
def test_the_optimisation_is_the_papers(kind: ModelType, early_stop: float, map_weight: float) -> None:
    tiny = Tiny(steps=4, model=tiny_model(kind))
    settings = Settings(inner_steps=4, early_stop=early_stop, map_weight=map_weight, map_side=4)
    found = value_inversion(tiny.model, tiny.trajectory, tiny.negative, settings, True)
    values, states = written_out(tiny, settings)
    start = tiny.source[0][0]
    assert relative(found.states, states) < 1e-4
    # Adam divides a gradient by its size: where that is nothing but rounding, so is its step.
    errors = (found.values - values).abs().flatten().sort().values[:-20]
    assert errors.norm() < 1e-3 * max(float((values - start).norm()), 1e-3)


def test_updates_are_most_at_the_first_steps() -> None:
    assert sum(Settings().updates(i) for i in range(50)) == sum(math.ceil(100 * math.exp(-0.1 * i)) for i in range(50))
    assert [Settings().updates(i) for i in (0, 1, 10, 49)] == [100, 91, 37, 1]


def test_each_image_of_a_batch_is_fitted_by_itself() -> None:
    tiny = Tiny(steps=3, batch=2)
    settings = QUICK._replace(inner_steps=5, early_stop=3.0)
    found = value_inversion(tiny.model, tiny.trajectory, tiny.negative, settings, True)
    for image in range(2):
        pivot = tiny.trajectory._replace(states=tiny.trajectory.states[:, image : image + 1])
        alone = value_inversion(tiny.model, pivot, tiny.negative, settings, True)
        assert relative(found.states[:, image], alone.states[:, 0]) < 1e-3
        assert relative(found.values[:, image], alone.values[:, 0]) < 1e-3


# --- in the host -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EPS, V])
def test_without_an_update_it_is_the_hosts_plain_sampler(kind: ModelType) -> None:
    tiny = Tiny(batch=2, model=tiny_model(kind))
    found = value_inversion(tiny.model, tiny.trajectory, tiny.negative, QUICK._replace(inner_steps=0), True)
    plain, result = sampled(tiny, QUICK.cfg)
    assert torch.equal(found.states[:-1], plain.states[:-1])
    assert torch.equal(tiny.model.model.process_latent_out(found.states[-1]), result)
    assert all(torch.equal(values, tiny.source[0][0].expand(2, -1, -1)) for values in found.values)


def identity_edit(tiny: Tiny, until: float) -> PromptToPrompt:
    """Prompt-to-Prompt of a prompt to itself, reading no more than values."""
    tokens = tiny.source[0][0].shape[1]
    eye = torch.eye(tokens)[None]
    carry = Carry(eye, torch.zeros(1, tokens))
    nothing = torch.zeros(2, 1, tokens)
    return PromptToPrompt(carry, tiny.source[0][0], torch.ones(1, tokens), nothing, NEVER, 0, eye, Window(0.0, until))


def test_an_edit_that_changes_nothing_is_the_reconstruction() -> None:
    """And comes closer to the images, here two, than the prompt's own values."""
    tiny = Tiny(batch=2)
    settings = Settings(inner_steps=8, learning_rate=0.05, map_side=4)
    found = value_inversion(tiny.model, tiny.trajectory, tiny.negative, settings, True)
    out = tiny.model.model.process_latent_out
    edited = attach(tiny.model, found, identity_edit(tiny, 1.0))
    ours, plain = (tiny.sample(model, tiny.source, tiny.negative, cfg=7.5) for model in (edited, tiny.model))
    assert relative(ours, out(found.states[-1])) < 1e-4
    for image in range(2):
        assert relative(ours[image], tiny.image[image]) < 0.95 * relative(plain[image], tiny.image[image])
    none = attach(tiny.model, found, identity_edit(tiny, 0.0))
    assert torch.equal(tiny.sample(none, tiny.source, tiny.negative, cfg=7.5), plain)


class Valued:
    """The to_v of a layer of a float64 copy."""

    def __init__(self, model: ModelPatcher) -> None:
        unet, _ = in_float64(model)
        self.unet: UNetModel = unet

    def __call__(self, place: tuple, values: Tensor) -> Tensor:
        _, side, number, index = place
        blocks = self.unet.middle_block if side == "middle" else getattr(self.unet, f"{side}_blocks")[number]
        block = next(layer for layer in blocks if hasattr(layer, "transformer_blocks")).transformer_blocks[index]
        return block.attn2.to_v(values.double()).unflatten(-1, (block.attn2.heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("cross", [2, 5])
def test_an_edit_with_values_is_its_formula(cross: int) -> None:
    """The source reads its values at every step. The target reads them where both prompts have a word for 3 of 5."""
    edit = edit_of("a cat on a mat", ["a dog on the mat"])
    tiny = Tiny(source=conditioning(1), target=conditioning(2))
    generator = torch.Generator().manual_seed(8)
    values = tiny.source[0][0] + torch.randn(tiny.steps, 1, 77, 64, generator=generator)
    ((embedding, options),) = tiny.source
    valued = tiny.trajectory._replace(conditioning=[[embedding, {**options, VALUES: values}]])
    carry, shared = edit.carry(), edit.shared()
    window = torch.tensor([0.0, cross / 5])[:, None, None].expand(2, 1, 77)
    rule = PromptToPrompt(carry, tiny.target[0][0], torch.ones(1, 77), window, NEVER, 0, shared, Window(0.0, 0.6))
    edited = tiny.sample(attach(tiny.model, valued, rule))
    to_v, maps = Valued(tiny.model), {}
    new = (shared[0].sum(0) == 0).double()[:, None]

    def attend(step: int, role: str, place: tuple, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = explicit(q, k)
        if place[0] == "self" or role == "negative":
            return own @ v
        if role == "source":
            maps[place] = own
            return own @ to_v(place, values[step])
        if step < 3:
            v = to_v(place, shared[0].double().T @ values[step].double() + new * tiny.target[0][0].double())
        if step < cross:
            own = maps[place] @ carry.source[0].double() + own * carry.own[0].double()
        return own @ v

    expected = tiny.model.model.process_latent_out(classic_run(tiny, 4.0, attend))
    assert relative(edited, expected) < 1e-4
    without = attach(tiny.model, tiny.trajectory, rule)
    assert relative(tiny.sample(without), expected) > 1e-3


def test_what_both_prompts_have_is_shared() -> None:
    edit = edit_of("a cat on a mat", ["a fat dog on a mat"])
    shared = edit.shared()[0]
    totals = shared.sum(0)
    assert [int(at) for at in (totals == 0).nonzero()] == [2, 3]  # fat, dog
    torch.testing.assert_close(totals[totals > 0], torch.ones(75))
    assert shared[3, 4] == shared[4, 5] == shared[5, 6] == 1  # on a mat


def test_values_are_kept_in_the_file(tiny: Tiny, tmp_path: Path) -> None:
    found = value_inversion(tiny.model, tiny.trajectory, tiny.negative, QUICK, True)
    found.save(tmp_path / "kept.safetensors")
    loaded = Trajectory.load(tmp_path / "kept.safetensors")
    assert torch.equal(loaded.values, found.values)
    assert torch.equal(loaded.states, found.states)
    ((embedding, options),) = found.conditioning
    short = found._replace(conditioning=[[embedding, {**options, VALUES: found.values[1:]}]])
    short.save(tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match="its values do not fit its steps"):
        Trajectory.load(tmp_path / "short.safetensors")


def test_the_node_reconstructs_a_scene(demo: tuple) -> None:
    """Through the nodes, a prompt edited to itself: nearer to the scene than the prompt's own values."""
    model, clip, vae = demo
    caption = "a photo of a red car on a street"
    image = vae.encode(torch.from_numpy(scenes.render(scenes.parse(caption, 3)))[None])
    sigmas = leading_sigmas(model.get_model_object("model_sampling").sigmas, 5)
    empty = [encode(clip, [""])]
    source, target, edit, _ = execute(PromptEdit, clip=clip, source_prompt=caption, target_prompt=caption + " at night")
    pivot = invert(model, Guidance(source, None, 1.0), image, sigmas)
    found, plot = execute(ValueInversion, model=model, trajectory=pivot, negative=empty, cfg=7.5, inner_steps=8)
    plain = resample(model, pivot, Guidance(source, empty, 7.5))
    assert relative(model.model.process_latent_out(found.states[-1]), image) < 0.8 * relative(plain, image)
    pictures = []
    for share in (0.0, 0.5):
        (edited,) = execute(
            P2PAttentionController, model=model, trajectory=found, prompt_edit=edit, value_replace=share
        )
        pictures.append(resample(edited, found, Guidance(target, empty, 7.5)))
    assert relative(pictures[1], image) < relative(pictures[0], image)
    assert plot.shape[0] == 1


def test_value_replace_does_nothing_without_values(demo: tuple) -> None:
    model, clip, vae = demo
    caption = "a photo of a red car on a street"
    image = vae.encode(torch.from_numpy(scenes.render(scenes.parse(caption, 3)))[None])
    sigmas = leading_sigmas(model.get_model_object("model_sampling").sigmas, 3)
    source, target, edit, _ = execute(PromptEdit, clip=clip, source_prompt=caption, target_prompt=caption + " at night")
    pivot = invert(model, Guidance(source, None, 1.0), image, sigmas)
    edits = [
        execute(P2PAttentionController, model=model, trajectory=pivot, prompt_edit=edit, value_replace=share)[0]
        for share in (0.0, 1.0)
    ]
    one, other = (resample(edited, pivot, Guidance(target, [encode(clip, [""])], 4.0)) for edited in edits)
    assert torch.equal(one, other)


@pytest.mark.parametrize(("checkpointing", "times"), [(True, 8), (False, 40)])
def test_memory_is_reserved_for_gradients(
    tiny: Tiny, checkpointing: bool, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, needed = comfy.model_management.load_models_gpu, []

    def watch(models: list[ModelPatcher], *, minimum_memory_required: float, **kwargs) -> None:
        needed.append(minimum_memory_required)  # what the host keeps free of weights
        load(models, minimum_memory_required=minimum_memory_required, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watch)
    tiny.sample(tiny.model)
    value_inversion(tiny.model, tiny.trajectory, tiny.negative, QUICK, checkpointing)
    plain, ours = needed
    assert ours == pytest.approx(times * plain)


# --- interrupts ------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_was_interrupted(temp: Path) -> None:
    """In the second of its four steps; each of these has two updates."""
    tiny = Tiny(steps=4)
    with pytest.raises(InterruptProcessingException):
        value_inversion(stopping(tiny.model, BEFORE + EACH + 2), tiny.trajectory, tiny.negative, QUICK, True)
    assert len(list(temp.iterdir())) == 1
    counted, rows = rows_of(tiny.model)
    resumed = value_inversion(counted, tiny.trajectory, tiny.negative, QUICK, True)
    assert len(rows) == BEFORE + 3 * EACH
    assert not list(temp.iterdir())
    rows.clear()
    whole = value_inversion(counted, tiny.trajectory, tiny.negative, QUICK, True)
    assert len(rows) == BEFORE + 4 * EACH
    assert torch.equal(resumed.values, whole.values)
    assert torch.equal(resumed.states, whole.states)


def test_progress_rises_with_every_update(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the end; the host leaves out what follows too fast."""
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    value_inversion(tiny.model, tiny.trajectory, tiny.negative, QUICK, True)
    total = sum(QUICK.updates(i) + 2 for i in range(tiny.steps))
    assert sorted(set(seen)) == seen
    assert seen[0] == (1, total)
    assert seen[-1] == (total, total)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refusals(tiny: Tiny) -> None:
    def refused(sentence: str, **changes: object) -> None:
        inputs = {
            "model": tiny.model,
            "trajectory": tiny.trajectory,
            "negative": tiny.negative,
            "map_side": 4,
        } | changes
        with pytest.raises(ValueError, match=sentence):
            execute(ValueInversion, **inputs)

    refused("Value Inversion was given a MODEL that is already edited", model=attach_nothing(tiny))
    refused(
        "Value Inversion fits its values to the steps of euler", trajectory=tiny.trajectory._replace(sampler="dpmpp_2m")
    )
    refused("follows the paper's learning rate, which ends at step 100", trajectory=Tiny(steps=101).trajectory)
    refused("The empty prompt of Value Inversion has 2 entries", negative=tiny.negative * 2)
    refused(
        "no cross-attention layer of 16 positions a side in this MODEL at latents of 8 x 8: set map_side to 8",
        map_side=16,
    )


def attach_nothing(tiny: Tiny) -> ModelPatcher:
    return attach(tiny.model, tiny.trajectory, identity_edit(tiny, 0.0))


def test_what_runs_the_source_by_its_prompt_alone_refuses_values(tiny: Tiny) -> None:
    found = value_inversion(tiny.model, tiny.trajectory, tiny.negative, QUICK, True)
    asked = {"model": tiny.model, "trajectory": found}
    for node, name, more in (
        (RecordAttention, "Record Attention", {}),
        (CrossAttentionGuidanceNode, "Cross Attention Guidance", {}),
        (NegativePromptGuidance, "Negative Prompt Guidance", {"empty": tiny.negative}),
        (NullTextInversion, "Null Text Inversion", {"empty": tiny.negative}),
        (ValueInversion, "Value Inversion", {"negative": tiny.negative}),
    ):
        with pytest.raises(ValueError, match=f"{name} runs the source by its prompt alone"):
            execute(node, **asked | more)
