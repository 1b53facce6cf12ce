"""Edits beside the host's ControlNet: what the source sees of it, and what it never sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import comfy.controlnet
import comfy.ops
import comfy.samplers
import pytest
import torch
from comfy.ldm.flux.controlnet import ControlNetFlux
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from nodes import ControlNetApplyAdvanced
from torch import Tensor

from flows import FLOWS, FLUX
from palimpsest.attention.record import Recording, record_attention
from palimpsest.guidance.cross_attention import CrossAttentionGuidance
from palimpsest.host.branch.call import CHUNKS, slice_of
from palimpsest.host.branch.guide import attach_guide
from palimpsest.host.branch.source import CALL, attach, attach_blend
from palimpsest.host.layer import Edit
from palimpsest.inversion.flow_edit import edit_image
from palimpsest.inversion.null_text import Settings as NullText
from palimpsest.inversion.null_text import null_text
from palimpsest.inversion.replay import invert_edict, invert_edit_friendly, invert_obelm
from palimpsest.inversion.run import Guidance, invert, record, resample
from palimpsest.inversion.virtual import PRESETS, invert_virtually, schedule
from test_composition import ALWAYS, Still, close, controlnet, edit
from test_ddim import relative
from test_flow_edit import STEPS as FLOW_STEPS
from test_flow_edit import Parts, noises, paper
from test_local_blend import blend
from test_source import split
from tiny import Tiny, randomise

CFG = 3.0
EULER = comfy.samplers.sampler_object("euler")
KINDS = pytest.mark.parametrize("kind", ["swap", "refine", "pnp", "masactrl"])
EVERYTHING = Recording(ALWAYS, ALWAYS, 64, 1 << 30, torch.float32, torch.device("cpu"))


class Settings(NamedTuple):
    """Of the host's Apply ControlNet."""

    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0


WHOLE, PART, STRONG = Settings(), Settings(0.6, 0.25, 0.7), Settings(5.0)


def applied(
    positive: list, negative: list, settings: Settings = WHOLE, images: int = 1, kept: slice = slice(None)
) -> tuple[list, list]:
    """Prompts through the host's Apply ControlNet, with a ControlNet that is loaded anew."""
    control, _ = controlnet()
    hint = torch.rand(images, 64, 64, 3, generator=torch.Generator().manual_seed(6))[kept]
    return ControlNetApplyAdvanced().apply_controlnet(positive, negative, control, hint, *settings)


def of_source(tiny: Tiny, kind: str) -> Edit:
    """An edit to the source's own prompt."""
    own = edit(kind)
    return replace(own, target=tiny.source[0][0]) if kind == "refine" else own


def edit_friendly(model: ModelPatcher, guidance: Guidance, image: Tensor, sigmas: Tensor) -> tuple:
    return invert_edit_friendly(model, guidance, image, sigmas, 1.0, 0)


def edict(model: ModelPatcher, guidance: Guidance, image: Tensor, sigmas: Tensor) -> tuple:
    return invert_edict(model, guidance, image, sigmas, 0.93)


class Seen(NamedTuple):
    step: int
    predicted: Tensor
    controlled: bool


def watched(model: ModelPatcher) -> tuple[ModelPatcher, list[Seen]]:
    """A clone of `model`, and what its UNet predicts for the source's rows."""
    seen: list[Seen] = []

    def watch(executor, x: Tensor, timesteps: Tensor, context, y, control, transformer_options: dict, **kwargs):
        controlled = control is not None
        out = executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        call = transformer_options.get(CALL)
        if call and call.source in transformer_options[CHUNKS]:
            at = transformer_options[CHUNKS].index(call.source)
            seen.append(Seen(call.index, out[slice_of(out, transformer_options[CHUNKS], at)].clone(), controlled))
        return out

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.watch", watch)
    return model, seen


def alone(tiny: Tiny, source: list, step: int) -> tuple[Tensor, bool]:
    """What the host's plain sampler gets for the source's state at a step, and whether its ControlNet was asked."""
    got: list[tuple[Tensor, bool]] = []

    def watch(executor, x: Tensor, timesteps: Tensor, context, y, control, transformer_options: dict, **kwargs):
        controlled = control is not None
        got.append((executor(x, timesteps, context, y, control, transformer_options, **kwargs), controlled))
        return got[0][0]

    model = tiny.model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.alone", watch)
    state = tiny.model.model.process_latent_out(tiny.trajectory.states[step])
    tiny.sample(model, source, cfg=1.0, noise=state, sigmas=tiny.trajectory.sigmas[step : step + 2])
    return got[0]


@KINDS
@pytest.mark.parametrize("settings", [WHOLE, PART], ids=["whole", "part"])
@pytest.mark.parametrize("target_too", [True, False], ids=["same hint", "source only"])
def test_the_source_sees_its_own(tiny: Tiny, kind: str, settings: Settings, target_too: bool) -> None:
    """Its rows are those of a plain run under the same hint at every step, in strength and range."""
    source, _ = applied(tiny.source, tiny.negative, settings)
    target = applied(tiny.target, tiny.negative, settings) if target_too else (tiny.target, tiny.negative)
    tiny.follow(invert(tiny.model, Guidance(source, None, 1.0), tiny.image, tiny.sigmas))
    model, seen = watched(tiny.model)
    tiny.sample(attach(model, tiny.trajectory, edit(kind)), *target)
    assert [one.step for one in seen] == list(range(tiny.steps))
    assert {one.controlled for one in seen} == ({True} if settings == WHOLE else {True, False})
    for one in seen:
        plain, controlled = alone(tiny, source, one.step)
        assert one.controlled == controlled
        assert relative(one.predicted, plain) < 1e-4
        assert not controlled or relative(one.predicted, alone(tiny, tiny.source, one.step)[0]) > 1e-3


@KINDS
@pytest.mark.parametrize("settings", [WHOLE, PART], ids=["whole", "part"])
def test_a_hint_of_the_target_leaves_the_source_as_it_was(tiny: Tiny, kind: str, settings: Settings) -> None:
    """To the last bit, as under a hint that adds nothing; the target's rows are moved."""
    runs = []
    for strength in (settings.strength, 1e-30):
        model, seen = watched(tiny.model)
        target = applied(tiny.target, tiny.negative, settings._replace(strength=strength))
        runs.append((tiny.sample(attach(model, tiny.trajectory, edit(kind)), *target), seen))
    (result, seen), (other, unmoved) = runs
    assert not any(one.controlled for one in seen)
    for one, same in zip(seen, unmoved, strict=True):
        assert (one.predicted - same.predicted).abs().max() == 0.0
    assert relative(result, other) > 1e-3


@pytest.mark.parametrize("kind", ["refine", "pnp", "masactrl"])
@pytest.mark.parametrize("stored", [False, True], ids=["live", "stored"])
@pytest.mark.parametrize("settings", [WHOLE, PART], ids=["whole", "part"])
def test_a_run_edited_to_its_own_prompt_is_that_run(tiny: Tiny, kind: str, stored: bool, settings: Settings) -> None:
    """As in the plain pair of two equal prompts, where what is read is one's own."""
    positive, negative = applied(tiny.source, tiny.negative, settings)
    cfg = CFG if kind == "refine" else 1.0  # of the others the negative rows read as well
    noise = torch.randn(tiny.noise.shape, generator=torch.Generator().manual_seed(1))
    start = torch.zeros_like(noise)
    trajectory, image = record(tiny.model, Guidance(positive, negative, cfg), EULER, tiny.sigmas, noise, start, seed=0)
    tiny.follow(trajectory)
    store = record_attention(tiny.model, trajectory, EVERYTHING) if stored else None
    again = tiny.sample(attach(tiny.model, trajectory, of_source(tiny, kind), store), positive, negative, cfg=cfg)
    assert relative(again, image) < 1e-4
    assert relative(tiny.sample(tiny.model, tiny.source, tiny.negative, cfg=cfg), image) > 1e-3


def test_a_hint_of_the_source_alone_stays_off_the_target(tiny: Tiny) -> None:
    source, _ = applied(tiny.source, tiny.negative)
    plain = tiny.sample(tiny.model)
    trajectory = tiny.trajectory._replace(conditioning=source)
    assert close(tiny.sample(attach(tiny.model, trajectory, Still())), plain)
    nothing, everything = (
        tiny.sample(attach_blend(tiny.model, trajectory, blend(phrases=None, user=mask, start=0.0)))
        for mask in (torch.zeros(1, 8, 8), torch.ones(1, 8, 8))
    )
    assert relative(nothing, tiny.image) < 1e-6
    assert torch.equal(everything, plain)


@pytest.mark.parametrize("invert_", [edit_friendly, invert_obelm, edict], ids=["edit-friendly", "o-belm", "edict"])
@pytest.mark.parametrize("settings", [WHOLE, PART], ids=["whole", "part"])
def test_exact_inversions_give_the_image_back(tiny: Tiny, invert_: Callable, settings: Settings) -> None:
    """Under the hint that they ran with, at their cfg, plain and through an edit of nothing; without it they do not."""
    positive, negative = applied(tiny.source, tiny.negative, settings)
    trajectory, sampler = invert_(tiny.model, Guidance(positive, negative, CFG), tiny.image, tiny.sigmas[1:].cpu())
    tiny.follow(trajectory)
    edited = attach(tiny.model, trajectory, of_source(tiny, "refine"))
    for model in (tiny.model, edited):
        assert relative(tiny.sample(model, positive, negative, cfg=CFG, sampler=sampler), tiny.image) < 1e-4
    assert relative(tiny.sample(tiny.model, tiny.source, tiny.negative, cfg=CFG, sampler=sampler), tiny.image) > 1e-3


def test_null_text_and_the_edit_sampler(tiny: Tiny) -> None:
    """Null-text's negatives under the hint bring back its own states, and Edit Sampler runs what SamplerCustom does."""
    positive, negative = applied(tiny.source, tiny.negative)
    tiny.follow(invert(tiny.model, Guidance(positive, None, 1.0), tiny.image, tiny.sigmas))
    negatives, found = null_text(tiny.model, tiny.trajectory, negative, NullText(CFG, inner_steps=2), True)
    tiny.follow(found)
    guidance = Guidance(positive, negatives, CFG)
    again = resample(tiny.model, tiny.trajectory, guidance)
    assert relative(again, tiny.model.model.process_latent_out(found.states[-1])) < 1e-4
    edited = attach(tiny.model, tiny.trajectory, edit("swap"))
    own = applied(tiny.target, negatives)
    assert torch.equal(resample(edited, tiny.trajectory, Guidance(*own, CFG)), tiny.sample(edited, *own, cfg=CFG))


@pytest.mark.parametrize("name", PRESETS)
def test_virtual_inversion(tiny: Tiny, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal prompts and hints give the image itself, to the last bit where every prompt has a model call of its own, as
    the source has beside a hint; another prompt, or a hint of the target's alone, does not.
    """
    split(monkeypatch, tiny)
    sigmas = schedule(tiny.model, "simple", 5, 0.6)
    positive, _ = applied(tiny.source, tiny.negative)
    sampler = comfy.samplers.ksampler(PRESETS[name].sampler, {})

    def edited(source: list, target: list, negative: list, cfg: float) -> Tensor:
        model, trajectory = invert_virtually(tiny.model, source, tiny.image, sigmas, PRESETS[name].fresh)
        return resample(model, trajectory, Guidance(target, negative, cfg), sampler)

    assert relative(edited(positive, positive, tiny.negative, 1.0), tiny.image) == 0.0
    assert relative(edited(positive, positive, positive, CFG), tiny.image) == 0.0
    hinted = edited(tiny.source, positive, tiny.negative, 1.0)
    assert relative(hinted, tiny.image) > 1e-3
    target, negative = applied(tiny.target, tiny.negative)
    for source in (positive, tiny.source):
        assert relative(edited(source, target, negative, CFG), edited(source, tiny.target, tiny.negative, CFG)) > 1e-3


def test_guidance_by_attention_moves_nothing_under_the_same_hint(tiny: Tiny) -> None:
    """But where target or source alone has it, the maps differ."""
    positive, negative = applied(tiny.source, tiny.negative)
    changes = {}
    for name, source, target in (
        ("same", positive, positive),
        ("target", tiny.source, positive),
        ("source", positive, tiny.source),
    ):
        tiny.follow(invert(tiny.model, Guidance(source, None, 1.0), tiny.image, tiny.sigmas))
        guided = attach_guide(tiny.model, tiny.trajectory, CrossAttentionGuidance(0.5, 1.0, 64, False), False)
        sigmas = tiny.sigmas[:2]
        plain = tiny.sample(tiny.model, target, negative, sigmas=sigmas)
        changes[name] = relative(tiny.sample(guided, target, negative, sigmas=sigmas), plain)
    assert changes["same"] < 1e-2 * min(changes["target"], changes["source"])


@KINDS
@pytest.mark.parametrize("shared", [False, True], ids=["hints apart", "one node's hints"])
def test_hints_of_a_batch(tiny: Tiny, kind: str, shared: bool) -> None:
    """Two targets of one source, each under a hint of its own; the source is under the first."""
    together = applied(tiny.target, tiny.negative, STRONG, images=2)
    hinted, _ = together if shared else applied(tiny.source, tiny.negative, STRONG, images=2)
    source = [[tiny.source[0][0], hinted[0][1]]]
    trajectory = tiny.trajectory._replace(conditioning=source)
    both = tiny.sample(attach(tiny.model, trajectory, edit(kind)), *together, noise=tiny.noise.repeat(2, 1, 1, 1))
    first, _ = applied(tiny.source, tiny.negative, STRONG, images=2, kept=slice(0, 1))
    for i in range(2):
        target = applied(tiny.target, tiny.negative, STRONG, images=2, kept=slice(i, i + 1))
        model = attach(tiny.model, tiny.trajectory._replace(conditioning=first), edit(kind))
        assert relative(both[i : i + 1], tiny.sample(model, *target)) < 1e-4
    assert relative(both[:1], both[1:]) > 1e-3


def flux_control() -> comfy.controlnet.ControlNet:
    """A tiny random ControlNet for the tiny Flux."""
    network = ControlNetFlux(operations=comfy.ops.disable_weight_init, dtype=torch.float32, device="cpu", **FLUX)
    randomise(network, 12)
    return comfy.controlnet.ControlNet(
        network, load_device=torch.device("cpu"), manual_cast_dtype=torch.float32, extra_conds=["y", "guidance"]
    )


@pytest.mark.parametrize("source_cfg", [1.0, 2.0])
def test_flow_edit_under_the_same_hint_is_the_papers_loop(source_cfg: float) -> None:
    """The prompt that guides the source's prediction has the hint of Apply ControlNet's negative output."""
    parts = Parts(FLOWS["Flux"])
    plain = parts.sample(edit_image(parts.model, parts.source, parts.image, cfg=source_cfg))
    control, hint = flux_control(), torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(6))
    apply = ControlNetApplyAdvanced().apply_controlnet
    parts.source, _ = apply(parts.source, parts.negative, control, hint, 1.0, 0.0, 1.0)
    parts.target, parts.negative = apply(parts.target, parts.negative, control, hint, 1.0, 0.0, 1.0)
    ours = parts.sample(edit_image(parts.model, parts.source, parts.image, cfg=source_cfg))
    assert relative(ours, paper(parts, noises(parts.image, FLOW_STEPS), source_cfg, 1.0)) < 2e-4
    assert relative(ours, plain) > 1e-3


def test_flow_edit_with_a_hint_of_the_target_alone() -> None:
    parts = Parts(FLOWS["Flux"])
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(6))
    parts.target, _ = ControlNetApplyAdvanced().apply_controlnet(
        parts.target, parts.negative, flux_control(), hint, 1.0, 0.0, 1.0
    )
    ours = parts.sample(edit_image(parts.model, parts.source, parts.image))
    assert relative(ours, paper(parts, noises(parts.image, FLOW_STEPS), 1.0, 1.0)) < 2e-4
