"""Inpainting checkpoints: source and target each see the mask of their own prompt, in inversions and in edits."""

from __future__ import annotations

from pathlib import Path

import comfy.utils
import folder_paths
import nodes as host_nodes
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from palimpsest.attention.p2p import Window
from palimpsest.demo import model as demo_model
from palimpsest.demo import scenes, train_inpaint
from palimpsest.demo.edits import Edit
from palimpsest.demo.outcomes import Outcomes
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.inversion.null_text import Settings as NullText
from palimpsest.inversion.null_text import null_text
from palimpsest.inversion.replay import invert_edict, invert_edit_friendly, invert_obelm
from palimpsest.inversion.run import Guidance, invert
from palimpsest.nodes.demo import LoadDemoInpaintModel
from test_composition import blend, edit
from test_source import swap
from tiny import Tiny, conditioning, execute, tiny_model

CHANNELS = 4  # of the latent; the mask and what it hides come after


@pytest.fixture(autouse=True)
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))


def hiding(seed: int) -> list:
    """A prompt as InpaintModelConditioning gives it out: what is hidden, and the latent of the rest."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(1, 1, 8, 8, generator=generator) > 0.5).float()
    shown = {"concat_latent_image": torch.randn(1, 4, 8, 8, generator=generator), "concat_mask": mask}
    return [[conditioning(seed)[0][0], shown]]


def nine_channels(**parts: object) -> Tiny:
    return Tiny(**{"steps": 3, "model": tiny_model(in_channels=9), "source": hiding(1), "target": hiding(2)} | parts)


def told(tiny: Tiny, prompt: list) -> Tensor:
    """[1, 5, h, w]: what the host's own model makes of a prompt's mask."""
    model, options = tiny.model.model, prompt[0][1]
    return model.concat_cond(noise=torch.zeros(1, 4, 8, 8), device=torch.device("cpu"), **options)


def watched(model: ModelPatcher) -> tuple[ModelPatcher, list[tuple[Tensor, Tensor]]]:
    """A clone, and of every row that its UNet is asked for: the latent, and what it sees beside it."""
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(executor, x: Tensor, *args, **kwargs):
        seen.extend((row[:CHANNELS].clone(), row[CHANNELS:].clone()) for row in x.detach())
        return executor(x, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.watch", watch)
    return model, seen


INVERSIONS = {
    "DDIM": lambda tiny, model: invert(model, Guidance(tiny.source), tiny.image, tiny.sigmas),
    "edit friendly": lambda tiny, model: invert_edit_friendly(
        model, Guidance(tiny.source), tiny.image, tiny.sigmas, 1.0, 0
    ),
    "EDICT": lambda tiny, model: invert_edict(model, Guidance(tiny.source), tiny.image, tiny.sigmas, 0.93),
    "O-BELM": lambda tiny, model: invert_obelm(model, Guidance(tiny.source), tiny.image, tiny.sigmas),
}


@pytest.mark.parametrize("inversion", INVERSIONS)
def test_an_inversion_sees_the_mask_of_its_prompt(inversion: str) -> None:
    tiny = nine_channels()
    model, seen = watched(tiny.model)
    INVERSIONS[inversion](tiny, model)
    assert seen
    assert all(torch.equal(beside, told(tiny, tiny.source)[0]) for _, beside in seen)
    assert not torch.equal(told(tiny, tiny.source), told(tiny, tiny.target))


@pytest.mark.parametrize("kind", ["swap", "refine", "pnp", "masactrl"])
def test_source_and_target_see_their_own_masks(kind: str) -> None:
    tiny = nine_channels(negative=hiding(2))
    model, seen = watched(tiny.model)
    tiny.sample(attach(model, tiny.trajectory, edit(kind)))
    of_source, of_target = (told(tiny, prompt)[0] for prompt in (tiny.source, tiny.target))
    states = [tiny.trajectory.states[i] / (1 + tiny.sigmas[i] ** 2) ** 0.5 for i in range(tiny.steps)]
    sources = [(x, beside) for x, beside in seen if torch.equal(beside, of_source)]
    assert len(sources) == tiny.steps
    for (x, _), state in zip(sources, states, strict=True):
        torch.testing.assert_close(x, state[0])
    assert sum(torch.equal(beside, of_target) for _, beside in seen) == 2 * tiny.steps
    assert len(seen) == 3 * tiny.steps


def test_an_edit_that_reads_nothing_is_the_plain_sampler() -> None:
    tiny, never = nine_channels(), Window(0.0, 0.0)
    plain = tiny.sample(tiny.model)
    assert torch.equal(tiny.sample(attach(tiny.model, tiny.trajectory, swap(cross=never, self_=never))), plain)


def test_local_blend_keeps_the_source_of_its_mask() -> None:
    tiny = nine_channels()
    model, seen = watched(tiny.model)
    tiny.sample(attach_blend(attach(model, tiny.trajectory, edit("swap")), tiny.trajectory, blend(4)))
    assert sum(torch.equal(beside, told(tiny, tiny.source)[0]) for _, beside in seen) == tiny.steps


def test_null_text_sees_the_masks_of_both_prompts() -> None:
    """And its negatives carry theirs to the edit."""
    tiny = nine_channels(negative=hiding(3))
    model, seen = watched(tiny.model)
    negative, found = null_text(model, tiny.trajectory, tiny.negative, NullText(inner_steps=1), True)
    of_source, of_negative = (told(tiny, prompt)[0] for prompt in (tiny.source, tiny.negative))
    sides = [torch.equal(beside, of_source) + 2 * torch.equal(beside, of_negative) for _, beside in seen]
    assert {*sides} == {1, 2}
    sampled = tiny.sample(tiny.model, tiny.source, negative, cfg=7.5)
    expected = tiny.model.model.process_latent_out(found.states[-1])
    torch.testing.assert_close(sampled, expected, rtol=1e-3, atol=1e-3)


# --- the demo model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inpaint() -> tuple:
    return execute(LoadDemoInpaintModel)


def test_the_file_is_small() -> None:
    assert demo_model.INPAINT_WEIGHTS.stat().st_size <= 3_000_000


def test_what_was_trained_is_what_the_host_samples(inpaint: tuple) -> None:
    """The same answer, from the training's UNet, and from the host's MODEL behind InpaintModelConditioning."""
    model, clip, vae = inpaint
    inpainter, file = train_inpaint.Inpainter(), comfy.utils.load_torch_file(str(demo_model.INPAINT_WEIGHTS))
    inpainter.first.copy_(file[f"diffusion_model.{demo_model.FIRST}.diff"])
    for index, name in enumerate(inpainter.lora.shapes):
        for side in ("up", "down"):
            parameter = getattr(inpainter.lora, side)[index]
            parameter.copy_(file[f"diffusion_model.{name}.lora_{side}.weight"].flatten(1))
    assert inpainter.file().keys() == file.keys()
    caption, level = "a photo of a red car on a street", 500
    pixels = torch.from_numpy(scenes.render(scenes.parse(caption, 3)))[None]
    mask = torch.zeros(1, 128, 128)
    mask[:, 30:90, 40:111] = 1
    noisy = torch.randn((1, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    text = inpainter.frozen[0].text
    beside = train_inpaint.told(vae.first_stage_model, pixels.movedim(-1, 1) * 2 - 1, mask[:, None])
    v = inpainter(noisy, torch.tensor([level - 1]), text(text.rows([caption])), beside)
    (prompt,) = host_nodes.CLIPTextEncode().encode(clip, caption)
    positive, _, _ = host_nodes.InpaintModelConditioning().encode(prompt, prompt, pixels, vae, mask)
    sigma = model.get_model_object("model_sampling").sigma(torch.tensor([float(level - 1)]))
    noise = torch.zeros_like(noisy)
    seen = model.model.concat_cond(noise=noise, device=torch.device("cpu"), **positive[0][1])
    torch.testing.assert_close(seen, beside, rtol=1e-4, atol=1e-4)
    model.patch_model()
    theirs = model.model.apply_model(noisy * (1 + sigma**2).sqrt(), sigma, c_concat=seen, c_crossattn=prompt[0][0])
    model.unpatch_model()
    kept = 1 / (1 + sigma**2)
    torch.testing.assert_close(theirs, kept.sqrt() * noisy - (1 - kept).sqrt() * v, rtol=2e-3, atol=2e-3)


def test_told_nothing_it_takes_all_for_hidden(inpaint: tuple) -> None:
    model = inpaint[0].model
    nothing = torch.zeros(2, 16, 16, 16)
    blank = model.concat_cond(noise=nothing, latent_image=nothing, device=torch.device("cpu"))
    grey = inpaint[2].encode(torch.full((1, 128, 128, 3), 0.5))
    assert torch.equal(blank[:, :1], torch.ones(2, 1, 16, 16))
    torch.testing.assert_close(blank[:, 1:], grey.expand(2, -1, -1, -1), rtol=1e-4, atol=1e-4)


def test_masks_hide_boxes_blobs_and_what_an_edit_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    changed = torch.zeros(64, 1, 128, 128, dtype=torch.bool)
    changed[:, :, 60:62, 60:62] = True
    made = train_inpaint.masks(changed, generator)
    assert set(made.unique().tolist()) == {0.0, 1.0}
    areas = made.mean((1, 2, 3))
    own = areas < 20**2 / 128**2
    assert 0.3 < float(own.float().mean()) < 0.7
    assert (areas[~own] > 0.03).all()


def test_it_draws_what_the_mask_hides_and_keeps_the_rest(inpaint: tuple) -> None:
    model, clip, vae = inpaint
    source, target = (f"a photo of a {thing} next to a red balloon on a meadow" for thing in ("rabbit", "yellow bus"))
    before, after = (torch.from_numpy(scenes.render(scenes.parse(text, 0)))[None] for text in (source, target))
    changed = torch.from_numpy(scenes.changed(before[0].numpy(), after[0].numpy())).float()[None]
    mask = torch.nn.functional.max_pool2d(changed, 9, 1, 4)
    prompts = [host_nodes.CLIPTextEncode().encode(clip, text)[0] for text in (target, "")]
    inputs = host_nodes.InpaintModelConditioning().encode(*prompts, before, vae, mask)
    (latent,) = host_nodes.KSampler().sample(model, 1, 10, 4.0, "euler", "normal", *inputs)
    drawn = vae.decode(latent["samples"])
    near = Outcomes(Edit("object", *(scenes.parse(text, 0) for text in (source, target))))
    assert not near.judge(before[0].numpy()).shown
    assert near.judge(drawn[0].numpy()).shown
    shown = torch.nn.functional.max_pool2d(mask, 24, 8, 8)[0] == 0  # latent positions apart from the mask
    assert shown.float().mean() > 0.5
    assert (latent["samples"] - vae.encode(before))[0, :, shown].abs().max() < 1e-5
