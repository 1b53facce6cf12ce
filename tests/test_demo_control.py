"""The demo ControlNet: the host's loader and Apply ControlNet make of its file what was trained, and outlines stay."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import comfy.utils
import numpy as np
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_canny import Canny
from nodes import CLIPTextEncode, ControlNetApplyAdvanced
from torch import Tensor

from palimpsest.demo import control as demo_control
from palimpsest.demo import model as demo_model
from palimpsest.demo import scenes
from palimpsest.inversion.ddim import leading_sigmas
from palimpsest.nodes.demo import LoadDemoControlNet
from test_ddim import relative
from tiny import execute

CAPTION = "a photo of a red car next to a house on a street"
LEVELS = pytest.mark.parametrize("level", [1, 400, 900])


@pytest.fixture(scope="module")
def loaded() -> tuple:
    return demo_model.load()


@pytest.fixture(scope="module")
def trained() -> demo_control.Control:
    """As it was exported: the training's modules with the numbers of the file."""
    control, file = demo_control.Control(), comfy.utils.load_torch_file(str(demo_model.CONTROL_WEIGHTS))
    state = control.network.state_dict()
    for key in state.keys() & file.keys():
        state[key].copy_(file[key])
    for index, name in enumerate(control.lora.shapes):
        for side in ("up", "down"):
            getattr(control.lora, side)[index].data.copy_(file[f"{name}.{side}"].flatten(1))
    exported = control.file()
    assert exported.keys() == file.keys()
    assert all(torch.equal(exported[key], file[key]) for key in file)
    return control.requires_grad_(False)


def drawn(caption: str, seed: int) -> Tensor:
    """[1, 128, 128, 3] in [0, 1]."""
    return torch.from_numpy(scenes.render(scenes.parse(caption, seed)))[None]


def under(hint: Tensor, *prompts: list, strength: float = 1.0) -> list[list]:
    """Prompts behind the host's Apply ControlNet."""
    (control,) = execute(LoadDemoControlNet)
    apply = ControlNetApplyAdvanced().apply_controlnet
    return [apply(one, [], control, hint, strength, 0.0, 1.0)[0] for one in prompts]


def sampled(model: ModelPatcher, positive: list, negative: list, noise: Tensor, sigmas: Tensor, cfg: float) -> Tensor:
    """By the host's euler sampler from noise that has its size already."""
    start = noise.new_zeros(noise.shape)
    euler = comfy.samplers.sampler_object("euler")
    return comfy.sample.sample_custom(
        model, noise, cfg, euler, sigmas, positive, negative, start, None, disable_pbar=True, seed=0
    )


def test_the_file_is_small() -> None:
    """And so are all that the pack brings beside the first model."""
    assert demo_model.CONTROL_WEIGHTS.stat().st_size <= 3_000_000
    files = demo_model.WEIGHTS.parent.glob("*.safetensors")
    assert sum(path.stat().st_size for path in files if path != demo_model.WEIGHTS) <= 20_000_000


@LEVELS
def test_what_was_trained_is_what_the_host_samples(loaded: tuple, trained: demo_control.Control, level: int) -> None:
    """The image that one step of the host's sampler leads to, behind its own loader, node and sampler.

    Both are float32 all through, so they differ by the order of sums alone: some dozen layers of roundings of 6e-8.
    """
    model, clip, _ = loaded
    (prompt,) = CLIPTextEncode().encode(clip, CAPTION)
    hint = demo_control.as_hint(torch.from_numpy(demo_control.edges(drawn(CAPTION, 3).movedim(-1, 1), 0.1)))
    (controlled,) = under(hint.movedim(1, -1), prompt)
    noisy = torch.randn((1, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    sigma = model.get_model_object("model_sampling").sigma(torch.tensor(float(level)))
    text = trained.base[0].text
    v = trained(noisy, torch.tensor([level]), text(text.rows([CAPTION])), hint)
    kept = 1 / (1 + sigma**2)
    image = kept.sqrt() * noisy - (1 - kept).sqrt() * v
    sigmas, noise = torch.stack([sigma, torch.zeros(())]), noisy * (1 + sigma**2).sqrt() / sigma
    theirs = sampled(model, controlled, prompt, noise, sigmas, cfg=1.0)
    alone = sampled(model, prompt, prompt, noise, sigmas, cfg=1.0)
    assert relative(theirs, image) < 5e-6
    assert relative(alone, image) > 1e-2


def test_at_strength_0_it_is_the_plain_sampler(loaded: tuple) -> None:
    """To the last bit; at 1 it is not."""
    model, clip, _ = loaded
    prompt, empty = (CLIPTextEncode().encode(clip, text)[0] for text in (CAPTION, ""))
    (hint,) = Canny.execute(drawn(CAPTION, 3), 0.1, 0.2)
    noise = torch.randn((1, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    sigmas = leading_sigmas(model.get_model_object("model_sampling").sigmas, 3)
    plain = sampled(model, prompt, empty, noise, sigmas, cfg=3.0)
    for strength, same in ((0.0, True), (1.0, False)):
        controlled = sampled(model, *under(hint, prompt, empty, strength=strength), noise, sigmas, cfg=3.0)
        assert (float((controlled - plain).abs().max()) == 0.0) == same


@pytest.mark.parametrize("low", demo_control.THRESHOLDS)
def test_edges_are_those_of_the_host_s_canny(low: float) -> None:
    picture = drawn(CAPTION, 3)
    (theirs,) = Canny.execute(picture, low, 2 * low).result
    ours = demo_control.edges(picture.movedim(-1, 1), low)
    assert 0.005 < ours.mean() < 0.3
    assert torch.equal(theirs, demo_control.as_hint(torch.from_numpy(ours)).movedim(1, -1))


def test_outlines_are_those_of_the_hint(loaded: tuple) -> None:
    """From the same noise, with the hint and without."""
    model, clip, vae = loaded
    captions = ("a photo of a cat on a meadow", "a photo of a house in the snow", "a watercolor of a tree on a beach")
    pictures = torch.cat([drawn(caption, seed) for seed, caption in enumerate(captions)])
    (hint,) = Canny.execute(pictures, 0.1, 0.2).result
    prompts = [CLIPTextEncode().encode(clip, text)[0] for text in (*captions, "")]
    sides = [[[torch.cat([prompt[0][0] for prompt in prompts[:-1]]), {}]], prompts[-1]]
    noise = torch.randn((len(captions), 16, 16, 16), generator=torch.Generator().manual_seed(0))
    sigmas = leading_sigmas(model.get_model_object("model_sampling").sigmas, 8)

    def distance(sides: list[list]) -> float:
        found = demo_control.edges(vae.decode(sampled(model, *sides, noise, sigmas, cfg=3.0)).movedim(-1, 1), 0.1)
        outlines = hint[..., 0].numpy() > 0
        return np.mean([demo_control.apart(one, other) for one, other in zip(found, outlines, strict=True)])

    assert distance(under(hint, *sides)) < 0.8 * distance(sides)
