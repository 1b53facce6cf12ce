"""Instruct Guidance: InstructPix2Pix on the host's own 8-channel class."""

from __future__ import annotations

import comfy.model_base
import comfy.samplers
import pytest
import torch
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from torch import Tensor

from palimpsest.attention.alignment import Carry
from palimpsest.attention.masactrl import MasaCtrl
from palimpsest.attention.p2p import PromptToPrompt, Window
from palimpsest.attention.pnp import PlugAndPlay
from palimpsest.guidance.instruct import NODE, Instruct
from palimpsest.host.branch.blocks import last_layers, layout_blocks
from palimpsest.host.branch.instructed import attach_instruction
from palimpsest.host.branch.source import attach
from palimpsest.inversion.run import Guidance, invert, resample
from tiny import Tiny, TinyConfig, rows_of, tiny_model

SCALES = [(7.5, 1.5), (4.0, 1.0), (1.0, 1.3), (0.0, 0.0)]


class InstructConfig(TinyConfig):
    def get_model(self, state_dict: dict, prefix: str = "", device=None):
        return comfy.model_base.SD15_instructpix2pix(self, self.model_type(state_dict, prefix), device)


@pytest.fixture(params=[ModelType.EPS, ModelType.V_PREDICTION], ids=["eps", "v"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return Tiny(model=tiny_model(request.param, config=InstructConfig, in_channels=8))


@pytest.fixture
def picture() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def beside(prompt: list, picture: Tensor) -> list:
    """As InstructPixToPixConditioning shows it the image."""
    return [[embedding, options | {"concat_latent_image": picture}] for embedding, options in prompt]


def shown(tiny: Tiny, picture: Tensor, image_scale: float) -> ModelPatcher:
    return attach_instruction(tiny.model, picture, Instruct(image_scale))


def dual(tiny: Tiny, picture: Tensor, cfg_conds: float, cfg_negative: float, nested: bool) -> Tensor:
    """By the host's own guider of three prompts."""
    guider = Guider_DualCFG(tiny.model)
    guider.set_conds(beside(tiny.target, picture), beside(tiny.negative, picture), tiny.negative)
    guider.set_cfg(cfg_conds, cfg_negative, nested)
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(torch.zeros_like(tiny.noise), tiny.noise, euler, tiny.sigmas, disable_pbar=True, seed=0)


@pytest.mark.parametrize(("text_scale", "image_scale"), SCALES)
def test_a_step_is_the_papers_formula(tiny: Tiny, picture: Tensor, text_scale: float, image_scale: float) -> None:
    sigmas = torch.tensor([tiny.sigmas[1], 0.0])  # one step of euler down to 0 is the denoised estimate
    asked = (beside(tiny.target, picture), beside(tiny.negative, picture), tiny.negative)
    full, image, nothing = (tiny.sample(tiny.model, prompt, cfg=1.0, sigmas=sigmas).double() for prompt in asked)
    expected = nothing + image_scale * (image - nothing) + text_scale * (full - image)
    result = tiny.sample(shown(tiny, picture, image_scale), cfg=text_scale, sigmas=sigmas)
    assert (full - image).norm() > 0.001 * full.norm()
    assert (image - nothing).norm() > 0.001 * full.norm()
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_hosts_guider_of_three_prompts_does_the_same(tiny: Tiny, picture: Tensor) -> None:
    """Its sum is taken in another order, so that the last bits differ; "nested" multiplies both scales."""
    result = tiny.sample(shown(tiny, picture, 1.5), cfg=7.5)
    scale = float(result.abs().max())
    regular, nested = dual(tiny, picture, 7.5, 1.5, nested=False), dual(tiny, picture, 5.0, 1.5, nested=True)
    torch.testing.assert_close(result, regular, rtol=0, atol=2e-5 * scale)
    torch.testing.assert_close(result, nested, rtol=0, atol=2e-5 * scale)
    assert (result - dual(tiny, picture, 7.5, 1.5, nested=True)).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("text_scale", [1.0, 4.0])
def test_at_image_scale_1_it_is_the_hosts_sampler(tiny: Tiny, picture: Tensor, text_scale: float) -> None:
    prompts = beside(tiny.target, picture), beside(tiny.negative, picture)
    plain = tiny.sample(tiny.model, *prompts, cfg=text_scale)
    assert (tiny.sample(shown(tiny, picture, 1.0), cfg=text_scale) - plain).abs().max() == 0
    assert (tiny.sample(tiny.model, cfg=text_scale) - plain).abs().max() > 0  # the image counts


@pytest.mark.parametrize(("text_scale", "image_scale", "rows"), [(7.5, 1.5, 3), (1.0, 1.5, 3), (7.5, 1, 2), (1, 1, 1)])
def test_its_rows(tiny: Tiny, picture: Tensor, text_scale: float, image_scale: float, rows: int) -> None:
    model, counted = rows_of(shown(tiny, picture, image_scale))
    tiny.sample(model, cfg=text_scale)
    assert sum(counted) == rows * tiny.steps


def test_nothing_of_it_stays_on_the_model(tiny: Tiny, picture: Tensor) -> None:
    before = tiny.sample(tiny.model)
    tiny.sample(shown(tiny, picture, 1.5))
    assert torch.equal(tiny.sample(tiny.model), before)


def images_of(model: ModelPatcher) -> tuple[ModelPatcher, list[Tensor]]:
    """A clone of `model` and a list that gets the image channels of every model call."""
    seen: list[Tensor] = []

    def look(executor, x: Tensor, t: Tensor, c_concat: Tensor, *args, **kwargs):
        seen.append(c_concat)
        return executor(x, t, c_concat, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test.images", look)
    return model, seen


EDITS = {
    "P2P": lambda tiny: PromptToPrompt(
        Carry(torch.eye(77)[None], torch.zeros(1, 77)),
        tiny.target[0][0],
        torch.ones(1, 77),
        torch.tensor([0.0, 0.8])[:, None, None].expand(2, 1, 77),
        Window(0.0, 0.5),
        32**2,
    ),
    "PnP": lambda tiny: PlugAndPlay(
        tuple(layout_blocks(tiny.model.model.diffusion_model))[:1],
        tuple(layout_blocks(tiny.model.model.diffusion_model)),
        0.8,
        0.5,
    ),
    "MasaCtrl": lambda tiny: MasaCtrl(last_layers(tiny.model.model.diffusion_model, -1), 0.0, False, None),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("edit_first", [False, True])
def test_attention_editors_run_beside_a_source_that_is_shown_the_image(
    tiny: Tiny, picture: Tensor, edit: str, edit_first: bool
) -> None:
    trajectory = invert(tiny.model, Guidance(beside(tiny.source, picture)), tiny.image, tiny.sigmas)
    rule = EDITS[edit](tiny)
    if edit_first:
        model = attach_instruction(attach(tiny.model, trajectory, rule), picture, Instruct(1.5))
    else:
        model = attach(shown(tiny, picture, 1.5), trajectory, rule)
    model, seen = images_of(model)
    model, rows = rows_of(model)
    guidance = Guidance(tiny.target, tiny.negative, 4.0)
    result = resample(model, trajectory, guidance)
    assert max(rows) == 4
    for image in seen:  # all rows but one are shown the image
        assert sum(torch.equal(row, picture[0]) for row in image) == len(image) - 1
        assert sum(not row.any() for row in image) == 1
    plain = resample(shown(tiny, picture, 1.5), trajectory, guidance)
    assert (result - plain).abs().max() > 1e-3 * plain.abs().max()


def test_a_model_without_image_channels_is_refused(picture: Tensor) -> None:
    with pytest.raises(ValueError, match=f"{NODE} shows the MODEL an image, for which this one .BaseModel. has no"):
        attach_instruction(tiny_model(), picture, Instruct(1.5))


def test_an_image_of_another_size_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=r"latents of shape \[1, 4, 16, 8\] but the sampler's are \[1, 4, 8, 8\]"):
        tiny.sample(shown(tiny, torch.zeros(1, 4, 16, 8), 1.5))


def test_a_second_image_is_refused(tiny: Tiny, picture: Tensor) -> None:
    with pytest.raises(ValueError, match=f"already carries an {NODE}"):
        attach_instruction(shown(tiny, picture, 1.5), picture, Instruct(1.5))


def test_a_guider_of_more_prompts_is_refused(tiny: Tiny, picture: Tensor) -> None:
    tiny.model = shown(tiny, picture, 1.5)
    with pytest.raises(ValueError, match="Guider_DualCFG combines a prompt 'middle' by itself"):
        dual(tiny, picture, 7.5, 1.5, nested=False)


def test_several_images_are_edited_at_once(tiny: Tiny) -> None:
    pictures = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    noise = torch.cat([tiny.noise, tiny.noise.flip(-1)])
    both = tiny.sample(shown(tiny, pictures, 1.5), noise=noise)
    for i in range(2):
        alone = tiny.sample(shown(tiny, pictures[i : i + 1], 1.5), noise=noise[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-4 * float(alone.abs().max()))


def test_an_image_that_the_prompts_hold_is_replaced(tiny: Tiny, picture: Tensor) -> None:
    """What InstructPixToPixConditioning said before is replaced, in the third prompt left out as well."""
    model, prompts = shown(tiny, picture, 1.5), (tiny.target, tiny.negative)
    assert torch.equal(tiny.sample(model, *(beside(prompt, -picture) for prompt in prompts)), tiny.sample(model))
