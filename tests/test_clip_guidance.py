"""CLIP guidance against GLIDE's formula in float64, through noise and by the estimate; what it leaves as it was."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from flows import FLOWS
from palimpsest.benchmarks.gradients import Held, clip_gradient, most_held, unet
from palimpsest.demo import model as demo_model
from palimpsest.guidance.clip_guidance import ClipGuidance, direction
from palimpsest.host.branch.judged import LAYERS, NoisedClip, Pictures, attach_judge
from palimpsest.host.branch.source import attach
from palimpsest.host.unet.gradients import gradients
from palimpsest.inversion.run import Guidance, invert
from palimpsest.inversion.virtual import invert_virtually
from palimpsest.nodes.clip_guidance import ClipGuidanceNode
from palimpsest.nodes.demo import LoadDemoClip
from reference import in_float64
from test_composition import edit
from test_flow_edit import Parts
from tiny import Tiny, execute, randomise, rows_of

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
SIZES |= {"image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu", "num_channels": 3}
SIZES |= {"model_type": "clip_vision_model"}
TEXT = torch.randn(1, 24, generator=torch.Generator().manual_seed(5))


class Eye(nn.Module):
    """The smallest network that looks at noisy latents and timesteps."""

    shape = (4, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(6)
        self.weight = nn.Parameter(torch.randn(4 * 8 * 8, 24, generator=generator) / 16)

    def image(self, x: Tensor, timestep: Tensor) -> Tensor:
        return (x.flatten(1) @ self.weight + timestep[:, None].to(x) / 1000).tanh()


def noised() -> NoisedClip:
    return NoisedClip(ModelPatcher(Eye(), torch.device("cpu"), torch.device("cpu")))


def rule(scale: float = 3.0, start: float = 0.0, end: float = 1.0) -> ClipGuidance:
    return ClipGuidance(scale, start, end, direction(TEXT))


def clip_vision(width: int = 24) -> ClipVisionModel:
    vision = ClipVisionModel(SIZES | {"projection_dim": width})
    randomise(vision.model, 7)
    return vision


def kl_vae() -> VAE:
    """The host's autoencoder of SD1.5 with few channels, on latents of 8 x 8 and 64 pixels."""
    layout = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32}
    layout |= {"ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    autoencoder = AutoencoderKL(ddconfig=layout, embed_dim=4)
    randomise(autoencoder, 8)
    return VAE(
        sd=autoencoder.state_dict(), config={"params": {"ddconfig": layout, "embed_dim": 4}}, dtype=torch.float32
    )


@pytest.mark.parametrize("looks", [0, 1, 2])
def test_gradients(looks: int) -> None:
    """With respect to the sampler's latent, against differences in float64."""
    eye, sigma = Eye().double(), 1.7
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(looks), dtype=torch.float64)
    guidance = rule()._replace(text=direction(TEXT.double()))

    def seen(latent: Tensor) -> Tensor:
        return eye.image(latent, torch.full((len(latent),), 300.0))

    def log_likelihood(x: Tensor) -> Tensor:
        embedding, text = seen(x / (1 + sigma**2) ** 0.5), TEXT.double()
        return 100 * (embedding @ text.T)[0, 0] / (embedding.norm() * text.norm())

    with gradients():
        gradient = guidance.noised(x.clone(), sigma, seen)
        estimated = guidance.estimated(x.clone(), sigma, seen)
    for at in range(0, 256, 37):
        step = torch.zeros(256, dtype=torch.float64)
        step[at] = 1e-5
        step = step.view_as(x)
        slope = (log_likelihood(x + step) - log_likelihood(x - step)) / 2e-5
        assert abs(float(slope - gradient.flatten()[at])) < 1e-8
        wide = (1 + sigma**2) ** 0.5  # as if what it sees were the estimate itself
        slope = (log_likelihood(wide * (x + step)) - log_likelihood(wide * (x - step))) / 2e-5 / wide**2
        assert abs(float(slope - estimated.flatten()[at])) < 1e-8
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.2, 0.6)])
def test_equals_glides_formula(start: float, end: float) -> None:
    """eps - s sqrt(1 - abar) grad of what a CLIP makes of x_t, in float64 under the host's Euler."""
    tiny, scale = Tiny(), 3.0
    sampled = tiny.sample(attach_judge(tiny.model, rule(scale, start, end), noised()))
    _, predicted = in_float64(tiny.model)
    eye, text = Eye().double(), TEXT.double()
    table = tiny.model.get_model_object("model_sampling").sigmas.double()
    x, levels = tiny.trajectory.states[0].double(), tiny.sigmas.double()
    for i, (sigma, below) in enumerate(zip(levels, levels[1:], strict=False)):
        positive, negative = (predicted(x, sigma, prompt, {}) for prompt in (tiny.target, tiny.negative))
        eps = negative + 4 * (positive - negative)
        if start <= i / tiny.steps < end:
            kept = 1 / (1 + sigma**2)
            with gradients():
                x_t = (kept.sqrt() * x).clone().requires_grad_()
                embedding = eye.image(x_t, (table - sigma).abs().argmin()[None].clone())
                product = 100 * (embedding * text.clone()).sum() / (embedding.norm() * text.norm())
                (gradient,) = torch.autograd.grad(product, x_t)
            eps = eps - scale * (1 - kept).sqrt() * gradient
        x = x + (below - sigma) * eps
    expected = tiny.model.model.process_latent_out(x.float())
    close = (sampled - expected).abs().max() / expected.abs().max()
    assert close < 1e-4
    assert (sampled - tiny.sample(tiny.model)).abs().max() / expected.abs().max() > 0.01


def test_an_ordinary_clip_sees_what_the_host_shows_it() -> None:
    """Its embedding of the estimate is Load CLIP Vision's of the decoded picture, but for the rounding to 8 bits."""
    tiny, vae, vision = Tiny(), kl_vae(), clip_vision()
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    shown = vision.encode_image(vae.decode(tiny.model.model.process_latent_out(latent)))["image_embeds"]
    seen = Pictures(vae, vision).embed(tiny.model.model, latent, 1.0)
    assert (seen - shown).abs().max() < 0.01 * shown.abs().max()
    assert (shown[0] - shown[1]).abs().max() > 0.05 * shown.abs().max()


def test_an_ordinary_clip_by_the_estimate() -> None:
    """D + s sigma^2 / (1 + sigma^2) grad_D, the gradient through autoencoder and CLIP against differences."""
    tiny, vae, vision = Tiny(steps=1), kl_vae(), clip_vision()
    judge, guidance, sigma = Pictures(vae, vision), rule(), float(tiny.sigmas[0])
    seen: list[tuple[Tensor, Tensor]] = []

    class Noting(ClipGuidance):
        def guided(self, x: Tensor, denoised: Tensor, *args) -> Tensor:
            seen.append((denoised, super().guided(x, denoised, *args)))
            return seen[-1][1]

    sampled = tiny.sample(attach_judge(tiny.model, Noting(*guidance), judge))
    ((denoised, guided),) = seen
    found = (guided - denoised) * (1 + sigma**2) / sigma**2 / guidance.scale

    def log_likelihood(latent: Tensor) -> Tensor:
        return 100 * cosine_similarity(judge.embed(tiny.model.model, latent, sigma), TEXT).double().sum()

    direction = found / found.norm()
    step = 0.02 * direction
    slope = (log_likelihood(denoised + step) - log_likelihood(denoised - step)) / 0.04
    assert abs(float(slope / found.norm()) - 1) < 0.02
    assert (sampled - tiny.sample(tiny.model)).abs().max() > 0


def by_pictures(judge: Pictures, base: BaseModel, latent: Tensor) -> Tensor:
    with gradients():
        return rule().estimated(latent.clone(), 1.0, lambda estimate: judge.embed(base, estimate, 1.0))


def test_checkpointing() -> None:
    """The same gradient, bit for bit, for less memory; VAE and CLIP are then as they were, also after an error."""
    tiny, vae, vision = Tiny(), kl_vae(), clip_vision()
    base, latent = tiny.model.model, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    layers = [
        layer for net in (vae.first_stage_model, vision.model) for layer in net.modules() if isinstance(layer, LAYERS)
    ]
    assert len(layers) > 12
    own = layers[0].forward
    layers[0].forward = own  # as another pack sets it
    before = [dict(vars(layer)) for layer in layers]
    weights = {name: weight.clone() for name, weight in vae.first_stage_model.state_dict().items()}
    short, long = (Pictures(vae, vision, checkpointing) for checkpointing in (True, False))
    with Held() as held:
        gradient = by_pictures(short, base, latent)
    with Held() as all_held:
        assert torch.equal(by_pictures(long, base, latent), gradient)
    assert held.most < 0.6 * all_held.most
    with pytest.raises(RuntimeError):
        by_pictures(short, base, latent[:, :3])
    assert [dict(vars(layer)) for layer in layers] == before
    assert all(torch.equal(weights[name], weight) for name, weight in vae.first_stage_model.state_dict().items())


@pytest.mark.parametrize("checkpointing", [True, False])
def test_memory_is_reserved(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What networks of true shape were counted to hold fits into it."""
    tiny, judge = Tiny(), Pictures(kl_vae(), clip_vision(), checkpointing)
    load, needed = comfy.model_management.load_models_gpu, []

    def watch(models: list[ModelPatcher], *, minimum_memory_required: float, **kwargs) -> None:
        needed.append(minimum_memory_required)  # what the host keeps free of weights
        load(models, minimum_memory_required=minimum_memory_required, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watch)
    for model in (tiny.model, attach_judge(tiny.model, rule(), judge), attach_judge(tiny.model, rule(), noised())):
        tiny.sample(model)
    plain, ours, small = needed
    row = tiny.model.model.memory_required([1, *tiny.noise.shape[1:]])
    assert judge.memory(tiny.noise.shape) <= ours < judge.memory(tiny.noise.shape) + row
    assert ours > small == plain
    model = unet("sd15")
    held = most_held(clip_gradient(model, "sd15", checkpointing))
    assert held < judge.memory((1, 4, 64, 64))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_nothing_changes_nothing(sampler: str) -> None:
    tiny = Tiny()
    plain = tiny.sample(tiny.model, sampler=sampler)
    (off,) = execute(ClipGuidanceNode, model=tiny.model, scale=0.0)
    assert torch.equal(tiny.sample(off, sampler=sampler), plain)
    between = attach_judge(tiny.model, rule(start=0.45, end=0.55), noised())
    assert torch.equal(tiny.sample(between, sampler=sampler), plain)
    guided = attach_judge(tiny.model, rule(), noised())
    once = tiny.sample(guided, sampler=sampler)
    assert torch.equal(tiny.sample(guided, sampler=sampler), once)
    assert not torch.equal(once, plain)
    assert torch.equal(tiny.sample(tiny.model, sampler=sampler), plain)


@pytest.mark.parametrize("first", [True, False])
def test_beside_edits(first: bool) -> None:
    """In any order with an edit from a trajectory: the target alone is guided, and nothing is run once more."""
    tiny = Tiny()
    model, rows = rows_of(tiny.model)

    def edited(model: ModelPatcher) -> ModelPatcher:
        return attach(model, tiny.trajectory, edit("swap"))

    def guided(model: ModelPatcher) -> ModelPatcher:
        return attach_judge(model, rule(), noised())

    tiny.sample(edited(model))
    alone = [*rows]
    rows.clear()
    result = tiny.sample(guided(edited(model)) if first else edited(guided(model)))
    assert rows == alone
    assert torch.equal(result, tiny.sample(guided(edited(tiny.model))))
    for other in (edited(tiny.model), guided(tiny.model)):
        assert not torch.equal(result, tiny.sample(other))


def test_each_image_of_a_batch_by_itself() -> None:
    tiny = Tiny(batch=2)
    guided = attach_judge(tiny.model, rule(), noised())
    both = tiny.sample(guided)
    for i in range(2):
        one = tiny.sample(guided, noise=tiny.noise[i : i + 1])
        assert (both[i : i + 1] - one).abs().max() < 1e-4 * one.abs().max()


def test_two_of_them() -> None:
    """Both gradients are added; what they look with is loaded beside the MODEL."""
    tiny = Tiny(steps=1)
    twice = attach_judge(attach_judge(tiny.model, rule(), noised()), rule(), noised())
    plain, once = tiny.sample(tiny.model), tiny.sample(attach_judge(tiny.model, rule(), noised()))
    assert (tiny.sample(twice) - plain - 2 * (once - plain)).abs().max() < 1e-4 * plain.abs().max()
    assert len(twice.get_additional_models()) == 2


def test_refusals() -> None:
    tiny, vae, vision = Tiny(), kl_vae(), clip_vision()
    (clip,) = execute(LoadDemoClip)
    parts = {"model": tiny.model, "prompt": "a photo of a dog on a meadow"}
    with pytest.raises(ValueError, match="CLIP Guidance lacks clip, clip_vision, vae: connect noised_clip"):
        execute(ClipGuidanceNode, **parts)
    with pytest.raises(ValueError, match="CLIP Guidance lacks clip: connect"):
        execute(ClipGuidanceNode, **parts, clip_vision=vision, vae=vae)
    with pytest.raises(ValueError, match="looks by one CLIP: disconnect noised_clip, or"):
        execute(ClipGuidanceNode, **parts, noised_clip=clip, vae=vae)
    with pytest.raises(ValueError, match="does not know the word 'unicorn': see Demo Scene"):
        execute(ClipGuidanceNode, **parts | {"prompt": "a photo of a unicorn"}, noised_clip=clip)
    with pytest.raises(ValueError, match="reads 24 words, not 25"):
        execute(ClipGuidanceNode, **parts | {"prompt": "a " * 25}, noised_clip=clip)
    with pytest.raises(ValueError, match=r"is to end at 0\.2 but starts at 0\.5"):
        execute(ClipGuidanceNode, **parts, noised_clip=clip, start=0.5, end=0.2)
    (guided,) = execute(ClipGuidanceNode, **parts, noised_clip=clip)
    with pytest.raises(ValueError, match="latents of 16 channels and 16 x 16, but this run's are of 4 channels and 8"):
        tiny.sample(guided)
    with pytest.raises(ValueError, match=r"another node's guidance \(CLIP Guidance\), which bends the path"):
        invert(guided, Guidance(tiny.source), tiny.image, tiny.sigmas)
    _, text, demo_vae = demo_model.load()
    wrong = attach_judge(tiny.model, rule(), Pictures(demo_vae, vision))
    with pytest.raises(ValueError, match="decodes latents of 16 channels, but this run's have 4"):
        tiny.sample(wrong)
    sentence = "clip of CLIP Guidance makes 128 numbers of a prompt and clip_vision 24 of a picture"
    with pytest.raises(ValueError, match=sentence):
        execute(ClipGuidanceNode, **parts, clip=text, clip_vision=vision, vae=vae)
    (ordinary,) = execute(ClipGuidanceNode, **parts, clip=text, clip_vision=clip_vision(128), vae=vae)
    assert not torch.equal(tiny.sample(ordinary), tiny.sample(tiny.model))
    siglip = ClipVisionModel(SIZES | {"model_type": "siglip_vision_model"})
    with pytest.raises(ValueError, match="clip_vision of CLIP Guidance makes no embedding that prompts have too"):
        execute(ClipGuidanceNode, **parts, clip=text, clip_vision=siglip, vae=vae)
    flow = Parts(FLOWS["Flux"])
    with pytest.raises(ValueError, match="CLIP Guidance is for models that predict noise or v"):
        execute(ClipGuidanceNode, **parts | {"model": flow.model}, noised_clip=clip)
    virtual, trajectory = invert_virtually(tiny.model, tiny.source, tiny.image, tiny.sigmas, seed=0)
    with pytest.raises(ValueError, match="looks at an image under noise, which a MODEL of Flow Edit or Virtual"):
        tiny.sample(attach_judge(virtual, rule(), noised()))
