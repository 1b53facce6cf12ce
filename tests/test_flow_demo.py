"""The embedded flow model: its training forward, its loader, and what the host's own nodes draw with it."""

from __future__ import annotations

import random
from collections import Counter

import comfy.ops
import nodes as host_nodes
import pytest
import torch
from comfy.ldm.flux.model import Flux
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import Tensor

from palimpsest.attention.editing import prompt_to_prompt, rewrite
from palimpsest.attention.p2p import Settings, Window
from palimpsest.demo import flow, run, scenes, score, train_flow
from palimpsest.host.run.cost import metered
from palimpsest.inversion.run import Guidance, ddim_sigmas, invert, resample
from palimpsest.nodes.blend import LocalBlendNode
from palimpsest.nodes.demo import LoadDemoFlowModel
from palimpsest.nodes.flow_edit import FlowEdit
from palimpsest.nodes.inject import PnPFeatureInjector
from palimpsest.nodes.inversion import DDIMInversion
from palimpsest.nodes.sampler import EditSampler
from tiny import execute


@pytest.fixture
def random_velocity() -> train_flow.Velocity:
    velocity = train_flow.Velocity()
    generator = torch.Generator().manual_seed(0)
    for parameter in velocity.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter.shape) ** 0.5)
    return velocity


def test_the_training_forward_is_the_hosts(random_velocity: train_flow.Velocity) -> None:
    host = Flux(**flow.FLUX, operations=comfy.ops.disable_weight_init)
    host.load_state_dict(random_velocity.state_dict())
    noisy, text, pooled = torch.randn(3, 16, 16, 16), torch.randn(3, flow.TEXT_TOKENS, 128), torch.randn(3, 128)
    time = torch.tensor([0.01, 0.5, 1.0])
    expected = host(noisy, time, text, pooled)
    assert expected.std() > 0.1
    torch.testing.assert_close(random_velocity(noisy, time, text, pooled), expected, rtol=1e-5, atol=1e-5)


def test_gelu_and_its_slope() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
        expected = torch.nn.functional.gelu(x, approximate="tanh")
        torch.testing.assert_close(train_flow.Gelu.apply(x), expected)
        slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (train_flow.Gelu.apply(x), expected)]
        torch.testing.assert_close(*slopes)


def test_the_file_is_small() -> None:
    assert flow.FLOW_WEIGHTS.stat().st_size < 14e6


def test_the_host_asks_the_model_what_it_was_trained_to_answer(demo: tuple) -> None:
    """Same weights, timesteps, cut conditionings and pooled outputs."""
    trained, model = train_flow.Velocity(), flow.load_flow()
    shipped, _ = run.shipped(flow.FLOW_WEIGHTS)
    trained.load_state_dict({key: value.float() for key, value in shipped.items()})
    captions = [scenes.sample(random.Random(seed)).caption for seed in range(3)] + [""]
    noisy = torch.randn(1, 16, 16, 16)
    for caption, text, pooled in zip(captions, *conditionings(captions), strict=True):
        sigma = torch.rand(1)
        conds = model.model.extra_conds(**hosts(demo, caption), noise=noisy, device="cpu")
        given = {key: cond.cond for key, cond in conds.items()}
        assert given.keys() == {"c_crossattn", "y"}
        torch.testing.assert_close(given["c_crossattn"], text[None].float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(given["y"], pooled[None], rtol=1e-4, atol=1e-4)
        expected = noisy - sigma * trained(noisy, sigma, given["c_crossattn"], given["y"])
        torch.testing.assert_close(model.model.apply_model(noisy, sigma, **given), expected, rtol=1e-4, atol=1e-4)


def conditionings(captions: list[str]) -> tuple[Tensor, Tensor]:
    return train_flow.Conditionings().of(captions)


def hosts(demo: tuple, caption: str) -> dict:
    [[tokens, options]] = host_nodes.CLIPTextEncode().encode(demo[1], caption)[0]
    return {"cross_attn": tokens, **options}


@pytest.fixture(scope="module")
def loaded() -> tuple:
    return execute(LoadDemoFlowModel)


def conditioned(clip: CLIP, text: str) -> list:
    return host_nodes.CLIPTextEncode().encode(clip, text)[0]


def test_the_node_gives_the_flow_model_with_the_others_clip_and_vae(loaded: tuple, demo: tuple) -> None:
    model, clip, vae = loaded
    assert isinstance(model.model, flow.FlowModel)
    image = torch.from_numpy(scenes.render(scenes.parse(SOURCE, 3)))[None]
    assert torch.equal(vae.encode(image), demo[2].encode(image))
    assert torch.equal(conditioned(clip, SOURCE)[0][0], conditioned(demo[1], SOURCE)[0][0])


def test_flow_edit_moves_the_picture_towards_the_answer(loaded: tuple) -> None:
    model, clip, vae = loaded
    before, answer = (torch.from_numpy(scenes.render(scenes.parse(text, 3)))[None] for text in (SOURCE, TARGET))
    source, target, negative = (conditioned(clip, text) for text in (SOURCE, TARGET, ""))
    edited, latent = execute(FlowEdit, model=model, image=before, vae=vae, source=source)

    def sampled(prompt: list, cfg: float) -> Tensor:
        settings = 0, 8, cfg, "euler", "simple", prompt, negative, latent, 0.9
        return host_nodes.KSampler().sample(edited, *settings)[0]["samples"]

    assert torch.equal(sampled(source, 1.0), latent["samples"])  # equal prompts leave the image alone
    picture = vae.decode(sampled(target, 2.0))
    assert (picture - answer).abs().mean() < 0.5 * (before - answer).abs().mean()


def test_an_inversion_comes_back_and_its_reads_keep_the_layout(loaded: tuple) -> None:
    model, clip, vae = loaded
    image = torch.from_numpy(scenes.render(scenes.parse(SOURCE, 3)))[None]
    source, target, negative = (conditioned(clip, text) for text in (SOURCE, TARGET, ""))
    trajectory, *_ = execute(DDIMInversion, model=model, source=source, image=image, vae=vae, steps=8)

    def sampled(model: ModelPatcher, prompt: list, cfg: float = 2.0) -> Tensor:
        prompts = {"positive": prompt, "negative": negative}
        return execute(EditSampler, model=model, trajectory=trajectory, vae=vae, cfg=cfg, **prompts)[0]["samples"]

    before = vae.encode(image)
    reads = execute(PnPFeatureInjector, model=model, trajectory=trajectory, tau_a=1.0)[0]
    back, plain, read = (
        (sampled(*run) - before).square().mean() for run in ((model, source, 1.0), (model, target), (reads, target))
    )
    assert back < 0.1 * plain
    assert back < read < 0.9 * plain


def test_an_edit_of_one_word(demo: tuple) -> None:
    """Prompt-to-Prompt confined to its word, from the image to the picture: three rows a step, two after its windows.

    The model reads 20 of the 77 tokens that the prompts have.
    """
    _, clip, vae = demo
    model, steps = flow.load_flow(), 10
    scene = scenes.parse("a photo of a red car on a street", seed=0)
    words = scene.caption, scene.caption.replace("red", "blue")
    image = torch.from_numpy(scenes.render(scene))[None]
    source, target, edit = rewrite(clip, *words)
    (negative,) = host_nodes.CLIPTextEncode().encode(clip, "")
    trajectory = invert(model, Guidance(source), vae.encode(image), ddim_sigmas(model, steps))
    edited, cost = metered(prompt_to_prompt(model, trajectory, edit, Settings(Window(0, 0.8), Window(0, 0.4), 32)))
    guidance = Guidance(target, negative, 3.0)
    result = resample(edited, trajectory, guidance)
    assert sum(cost.rows) == 3 * 8 + 2 * 2
    plain = resample(model, trajectory, guidance)
    assert (result - plain).abs().mean() > 0.01
    inputs = {"model": edited, "trajectory": trajectory, "prompt_edit": edit, "words": "blue, red", "start": 0.2}
    (blended,) = execute(LocalBlendNode, **inputs)
    confined = resample(blended, trajectory, guidance)
    kept = (confined == trajectory.states[-1]).all(1)
    assert 0 < kept.float().mean() < 1
    assert torch.isfinite(vae.decode(confined)).all()
    assert torch.equal(resample(model, trajectory, guidance), plain)


@pytest.mark.slow
def test_the_hosts_own_nodes_draw_what_is_asked_for(demo: tuple) -> None:
    _, clip, vae = demo
    model, rng, right = flow.load_flow(), random.Random("held out"), Counter()
    (negative,) = host_nodes.CLIPTextEncode().encode(clip, "")
    for seed in range(DRAWN):
        scene = scenes.sample(rng, pair=False)
        (positive,) = host_nodes.CLIPTextEncode().encode(clip, scene.caption)
        latent = {"samples": torch.zeros(1, 16, 16, 16)}
        prompts = positive, negative
        (latent,) = host_nodes.KSampler().sample(model, seed, 20, 3.0, "euler", "simple", *prompts, latent)
        (image,) = host_nodes.VAEDecode().decode(vae, latent)
        right.update(word for word, so in score.judge(image[0].numpy(), scene).items() if so)
    assert {word: right[word] for word in LEAST if right[word] < LEAST[word]} == {}


SOURCE, TARGET = "a photo of a red house in the snow", "a photo of a red house in a desert"
DRAWN = 3
LEAST = {"style": 3, "place": 3, "time": 3, "look": 1}
