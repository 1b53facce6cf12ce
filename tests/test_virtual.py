"""Virtual Inversion: every preset against its paper's update in float64, and what it leaves exactly as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import comfy.samplers
import nodes
import pytest
import torch
from comfy.k_diffusion import sampling as k_diffusion
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy.samplers import KSAMPLER, Sampler
from comfy_extras.nodes_custom_sampler import SamplerCustom
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_easycache import LazyCacheNode
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from torch import Tensor

from palimpsest.demo import scenes
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.inversion.run import Guidance, invert, record, resample
from palimpsest.inversion.virtual import PRESETS, invert_virtually, schedule
from palimpsest.nodes.p2p import P2PAttentionController
from palimpsest.nodes.prompt import PromptEdit
from palimpsest.nodes.sampler import EditSampler
from palimpsest.nodes.store import RecordAttention
from palimpsest.nodes.virtual import VirtualInversion
from reference import classic_p2p, in_float64, swapped
from test_flow_edit import Denoise, Loop
from test_inject import PNP, masactrl
from test_local_blend import blend
from test_source import Wrapped, some_mapper, swap
from tiny import Tiny, conditioning, execute, rows_of, tiny_model

CAPTION, CHANGE = "a photo of a red car on a street", ("red", "blue")  # of the demo's world
CFG, STEPS, SEED = 3.0, 5, 4
TOLD = {4: [799, 599, 399, 199], 8: [799, 699, 599, 499, 399, 299, 199, 99]}  # of a table of 50
FLOWEDIT, ONE_NOISE, INFEDIT, EDIT_FRIENDLY = PRESETS
presets = pytest.mark.parametrize("name", PRESETS)

Estimate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Takes the source's and the target's x at a sigma; returns the source's eps, the target's guided eps and sigma."""


def sampler_of(name: str, **options) -> Sampler:
    return comfy.samplers.ksampler(PRESETS[name].sampler, options)


def virtual(tiny: Tiny, name: str, model: ModelPatcher | None = None, **inputs) -> tuple:
    sigmas = schedule(tiny.model, "simple", STEPS, 0.6)
    return invert_virtually(model or tiny.model, tiny.source, tiny.image, sigmas, PRESETS[name].fresh, **inputs)


def guidance(tiny: Tiny, cfg: float = CFG) -> Guidance:
    return Guidance(tiny.target, tiny.negative, cfg)


def test_samplers_as_other_packs_wrap_them() -> None:
    """A partial is what it wraps, its settings included; what cannot be known is refused."""
    tiny = Tiny()
    model, trajectory = virtual(tiny, EDIT_FRIENDLY, seed=SEED)
    function = k_diffusion.sample_euler_ancestral
    plain, half, wrapped = (
        resample(model, trajectory, guidance(tiny), sampler)
        for sampler in (
            KSAMPLER(function),
            KSAMPLER(function, {"eta": 0.5}),
            KSAMPLER(partial(function, eta=0.5)),
        )
    )
    assert torch.equal(wrapped, half)
    assert not torch.equal(plain, half)
    with pytest.raises(ValueError, match="The sampler 'Wrapped' mixes more into a step"):
        resample(model, trajectory, guidance(tiny), KSAMPLER(Wrapped(k_diffusion.sample_euler)))


def infedit(x0: Tensor, sigmas: list[Tensor], noise: list[Tensor], estimate: Callable) -> Tensor:
    """Algorithm 2 with eta = 1, in z: the source is drawn anew from the image, the target jumps to its clean image."""
    signal = [(1 + sigma**2) ** -0.5 for sigma in sigmas]  # sqrt(alpha)
    source = target = signal[0] * (x0 + sigmas[0] * noise[0])
    for i in range(len(sigmas) - 1):
        root, rest = signal[i], (1 - signal[i] ** 2).sqrt()
        e_source, e_target = estimate(source / root, target / root, sigmas[i])
        clean = x0 + (target - source - rest * (e_target - e_source)) / root
        if i + 2 < len(sigmas):
            added = (1 - signal[i + 1] ** 2).sqrt() * noise[i + 1]
            source, target = signal[i + 1] * x0 + added, signal[i + 1] * clean + added
    return clean


def flowedit(x0: Tensor, sigmas: list[Tensor], noise: list[Tensor], estimate: Callable) -> Tensor:
    """Algorithm 1 with n_avg = 1: the edit moves by the difference of two velocities, eps in this space."""
    edit = x0
    for i, (sigma, below) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        source = x0 + sigma * noise[i]
        e_source, e_target = estimate(source, edit + source - x0, sigma)
        edit = edit + (below - sigma) * (e_target - e_source)
    return edit


def edit_friendly(x0: Tensor, sigmas: list[Tensor], noise: list[Tensor], estimate: Callable) -> Tensor:
    """Noise maps of the states x0 + sigma n, replayed for the target. noise: of each state."""
    target = x0 + sigmas[0] * noise[0]
    for i, (sigma, below) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        source = x0 + sigma * noise[i]
        after = x0 + below * noise[i + 1]
        e_source, e_target = estimate(source, target, sigma)
        mean_source, mean_target = (
            x - sigma * e + (below / sigma) ** 2 * sigma * e for x, e in ((source, e_source), (target, e_target))
        )
        target = mean_target + (after - mean_source)
    return target


@presets
@pytest.mark.parametrize("prediction", [ModelType.EPS, ModelType.V_PREDICTION])
def test_equals_the_papers_update(name: str, prediction: ModelType) -> None:
    tiny = Tiny(model=tiny_model(prediction))
    model, trajectory = virtual(tiny, name, seed=SEED)
    generator = torch.Generator().manual_seed(9)
    drawn = [torch.randn(tiny.image.shape, generator=generator) for _ in range(STEPS)]
    options = {"noise_sampler": lambda *_: drawn.pop(0)} if name in (INFEDIT, EDIT_FRIENDLY) else {}
    own, later = list(drawn), torch.Generator().manual_seed(SEED + 1)
    ours = tiny.model.model.process_latent_in(resample(model, trajectory, guidance(tiny), sampler_of(name, **options)))

    _, predict = in_float64(tiny.model)
    x0, sigmas = trajectory.states[-1].double(), [sigma.double() for sigma in trajectory.sigmas]
    first = ((trajectory.states[0] - trajectory.states[-1]) / trajectory.sigmas[0]).double()

    def estimate(source: Tensor, target: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        e_source = predict(source, sigma, tiny.source, {})
        positive, negative = (predict(target, sigma, prompt, {}) for prompt in (tiny.target, tiny.negative))
        return e_source, negative + CFG * (positive - negative)

    if name == INFEDIT:
        theirs = infedit(x0, sigmas, [first, *(n.double() for n in own)], estimate)
    elif name == EDIT_FRIENDLY:
        noise = [first]
        for i, (sigma, below) in enumerate(zip(sigmas, sigmas[1:-1], strict=False)):  # the states that the host draws
            kept = (below / sigma) ** 2
            noise.append((kept * sigma * noise[i] + below * (1 - kept).sqrt() * own[i].double()) / below)
        theirs = edit_friendly(x0, sigmas, [*noise, x0 * 0], estimate)
    else:
        fresh = [torch.randn(tiny.image.shape, generator=later).double() for _ in range(STEPS)]
        theirs = flowedit(x0, sigmas, [first, *fresh] if name == FLOWEDIT else [first] * STEPS, estimate)
    assert (theirs - x0).norm() > 0.05 * x0.norm()
    assert (ours - theirs).norm() < 2e-5 * (theirs - x0).norm()  # on one thread rounding alone comes to 1.04e-5


@pytest.mark.parametrize("steps", [4, 8])
def test_infedit_on_the_hosts_lcm_sampling(tiny: Tiny, steps: int) -> None:
    """At timesteps that a distilled model knows, by the denoised estimates that it gives there."""
    (model,) = ModelSamplingDiscrete().patch(tiny.model, "lcm", False)
    sigmas = schedule(model, "simple", steps, 0.8)
    told = model.get_model_object("model_sampling").timestep(sigmas[:-1])
    assert told.tolist() == TOLD[steps]
    edited, trajectory = invert_virtually(model, tiny.source, tiny.image, sigmas, seed=SEED)
    drawn = [torch.randn(tiny.image.shape, generator=torch.Generator().manual_seed(9 + i)) for i in range(steps)]
    left = list(drawn)
    options = {"noise_sampler": lambda *_: left.pop(0)}
    ours = resample(edited, trajectory, guidance(tiny), sampler_of(INFEDIT, **options))

    def body(denoise: Denoise, image: Tensor) -> Tensor:
        source = target = trajectory.states[0].double()
        for i, (sigma, below) in enumerate(zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False)):
            positive, negative = (denoise(prompt, target, sigma) for prompt in ("positive", "negative"))
            clean = image + negative + CFG * (positive - negative) - denoise("source", source, sigma)
            added = below * drawn[i].double()
            source, target = image + added, clean + added
        return clean

    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": tiny.target, "negative": tiny.negative, "source": tiny.source})
    theirs = guider.sample(torch.zeros_like(tiny.image), tiny.image, Loop(body), sigmas, disable_pbar=True, seed=0)
    assert (theirs - tiny.image).norm() > 0.05 * tiny.image.norm()
    assert (ours - theirs).norm() < 1e-5 * (theirs - tiny.image).norm()


@pytest.mark.parametrize(
    "sampler",
    [
        comfy.samplers.sampler_object("ddim"),
        comfy.samplers.sampler_object("ddpm"),
        comfy.samplers.ksampler("euler_ancestral", {"eta": 0.5}),
        comfy.samplers.ksampler("lcm", {"s_noise": 0.9}),
    ],
    ids=["ddim", "ddpm", "eta", "s_noise"],
)
def test_the_difference_is_followed_as_the_sampler_moves_it(tiny: Tiny, sampler: Sampler) -> None:
    """What the sampler itself comes to is the image and that difference, to rounding."""
    model, trajectory = virtual(tiny, INFEDIT)
    plain, ends = sampler.sampler_function, []

    def watched(*args, **options) -> Tensor:
        ends.append(plain(*args, **options))
        return ends[-1]

    watched.__name__ = plain.__name__
    sampler.sampler_function = watched
    edit = resample(model, trajectory, guidance(tiny), sampler)
    assert (edit - tiny.image).norm() > 0.05 * tiny.image.norm()
    assert (tiny.model.model.process_latent_out(ends[0]) - edit).abs().max() < 1e-5 * edit.abs().max()


@presets
def test_equal_prompts_give_the_image_itself(tiny: Tiny, name: str) -> None:
    model, trajectory = virtual(tiny, name)
    same = Guidance(tiny.source, tiny.source, 1.0)
    for model_, cfg in ((model, 1.0), (model, CFG), (attach(model, trajectory, swap(target=tiny.source[0][0])), CFG)):
        result = resample(model_, trajectory, same._replace(cfg=cfg), sampler_of(name))
        assert (result - tiny.image).abs().max() == 0.0


@presets
def test_runs_again_to_the_same_bits_and_another_seed_is_another_edit(tiny: Tiny, name: str) -> None:
    def edit(seed: int) -> Tensor:
        return resample(*virtual(tiny, name, seed=seed), guidance(tiny), sampler_of(name))

    assert torch.equal(edit(0), edit(0))
    assert not torch.equal(edit(0), edit(1))


def test_the_largest_seed_of_a_widget(tiny: Tiny) -> None:
    ends = [
        resample(*virtual(tiny, FLOWEDIT, seed=seed), guidance(tiny), sampler_of(FLOWEDIT)) for seed in (0, 2**64 - 1)
    ]
    assert not torch.equal(*ends)


@presets
def test_ksampler_gives_the_same_bits(tiny: Tiny, name: str) -> None:
    sigmas = schedule(tiny.model, "karras", 4, 0.7)
    model, trajectory = invert_virtually(tiny.model, tiny.source, tiny.image, sigmas, PRESETS[name].fresh, seed=SEED)
    (theirs,) = nodes.KSampler().sample(
        model, SEED, 4, CFG, PRESETS[name].sampler, "karras", tiny.target, tiny.negative, {"samples": tiny.image}, 0.7
    )
    assert torch.equal(resample(model, trajectory, guidance(tiny), sampler_of(name)), theirs["samples"])


@pytest.mark.parametrize("edit", ["none", "p2p", "pnp", "masactrl"])
def test_rows(tiny: Tiny, edit: str) -> None:
    """Attention and prediction are read from the same row, in one call a step."""
    counted, rows = rows_of(tiny.model)
    for targets, cfg, expected in ((1, CFG, [3]), (1, 1.0, [2]), (3, CFG, [1, 6])):
        rows.clear()
        positive = [[torch.cat([conditioning(seed)[0][0] for seed in (2, 7, 8)[:targets]]), {}]]
        model, trajectory = virtual(tiny, FLOWEDIT, counted)
        if edit != "none":
            rule = {"p2p": swap(target=positive[0][0]), "pnp": PNP, "masactrl": masactrl(tiny)}[edit]
            model = attach(model, trajectory, rule)
        result = resample(model, trajectory, Guidance(positive, tiny.negative, cfg), sampler_of(FLOWEDIT))
        assert rows == expected * STEPS
        assert len(result) == targets


@pytest.mark.parametrize("name", [FLOWEDIT, ONE_NOISE])
def test_targets_side_by_side_are_those_of_one_by_one(tiny: Tiny, name: str) -> None:
    """They share the image's noise, so that one source is enough."""
    model, trajectory = virtual(tiny, name)
    prompts = [conditioning(seed) for seed in (2, 7)]
    joined = [[torch.cat([prompt[0][0] for prompt in prompts]), {}]]
    both = resample(model, trajectory, Guidance(joined, tiny.negative, CFG), sampler_of(name))
    for image, prompt in zip(both, prompts, strict=True):
        alone = resample(model, trajectory, Guidance(prompt, tiny.negative, CFG), sampler_of(name))
        assert (image - alone[0]).abs().max() < 1e-5 * alone.abs().max()


def test_p2p_on_the_same_branch_is_the_classic_one(tiny: Tiny) -> None:
    model, tiny.trajectory = virtual(tiny, ONE_NOISE)
    tiny.sigmas = tiny.trajectory.sigmas
    mapper = some_mapper()
    edited = attach(model, tiny.trajectory, swap(mapper, self_=swap().self_))
    ours = resample(edited, tiny.trajectory, guidance(tiny), sampler_of(ONE_NOISE))
    theirs = classic_p2p(tiny, swapped(mapper, STEPS), STEPS, CFG, virtual=True)
    plain = resample(model, tiny.trajectory, guidance(tiny), sampler_of(ONE_NOISE))
    ours, plain = (tiny.model.model.process_latent_in(samples) for samples in (ours, plain))
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    assert (plain - theirs).norm() > 1e-3 * theirs.norm()


@presets
def test_outside_a_noise_mask_is_the_image_itself(tiny: Tiny, name: str) -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:5] = 1
    model, trajectory = virtual(tiny, name, mask=mask)
    result = resample(model, trajectory, guidance(tiny), sampler_of(name))
    changed = (result != tiny.image).any(1)[0]
    assert torch.equal(changed, mask[0, 0] > 0)
    latent = {"samples": tiny.image, "noise_mask": mask}
    prompts = guidance(tiny)[:2]
    sampler, sigmas = sampler_of(name), trajectory.sigmas.clone()
    theirs = SamplerCustom.execute(model, True, 0, CFG, *prompts, sampler, sigmas, latent)[0]["samples"]
    assert torch.equal(theirs, result)


@presets
def test_outside_a_mask_of_differential_diffusion_is_the_image_itself(tiny: Tiny, name: str) -> None:
    model, trajectory = virtual(tiny, name, mask=torch.linspace(0, 1, 8).expand(1, 1, 8, 8))
    (model,) = DifferentialDiffusion.execute(model, 1.0).result
    result = resample(model, trajectory, guidance(tiny), sampler_of(name))
    assert torch.equal(result[..., 0], tiny.image[..., 0])
    assert (result[..., -1] != tiny.image[..., -1]).any(1).all()


def test_refusals(tiny: Tiny) -> None:
    model, trajectory = virtual(tiny, INFEDIT)
    latent = {"samples": tiny.image}

    def sampled(name: str = "lcm", sigmas: Tensor = trajectory.sigmas, noise: bool = True, **changes) -> None:
        sampler = comfy.samplers.sampler_object(name)
        given = latent | changes
        SamplerCustom.execute(model, noise, 0, CFG, tiny.target, tiny.negative, sampler, sigmas.clone(), given)

    for name in ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "heun", "euler_ancestral_cfg_pp"):
        with pytest.raises(
            ValueError, match=f"sampler '{name.replace('uni_pc', 'unipc')}' mixes more .*: choose euler"
        ):
            sampled(name)
    with pytest.raises(ValueError, match="latent_image is not the image of Virtual Inversion"):
        sampled(samples=tiny.image.flip(0).roll(1, -1))
    with pytest.raises(ValueError, match="adds no noise to the image"):
        sampled(noise=False)
    with pytest.raises(ValueError, match=r"begins at sigma 80, but this MODEL knows noise up to 14\.61 alone"):
        sampled(sigmas=torch.tensor([80.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="stops at sigma 1, but an edit by Virtual Inversion is known at the end"):
        sampled(sigmas=torch.tensor([8.0, 1.0]))
    with pytest.raises(ValueError, match="starts at the end of its schedule at strength 0: raise strength"):
        schedule(tiny.model, "karras", 8, 0.0)
    inverted = invert(tiny.model, Guidance(tiny.source), tiny.image, tiny.sigmas)
    for wrong in (lambda: attach(model, inverted, swap()), lambda: resample(model, inverted, guidance(tiny))):
        with pytest.raises(ValueError, match="takes no trajectory but its own"):
            wrong()
    plain = attach(tiny.model, trajectory, swap())
    for wrong in (tiny.model, plain):
        with pytest.raises(ValueError, match="connect the model output of Virtual Inversion"):
            resample(wrong, trajectory, guidance(tiny))
    with pytest.raises(ValueError, match="Local Blend reads the source's states, which Virtual Inversion and"):
        attach_blend(model, trajectory, blend(tiny))
    store, *_ = execute(RecordAttention, model=tiny.model, trajectory=trajectory)
    with pytest.raises(ValueError, match="An attention store reads the source's states, which Virtual Inversion"):
        attach(model, trajectory, swap(), store)
    with pytest.raises(ValueError, match="needs every answer of the model, but LazyCache leaves some out"):
        resample(LazyCacheNode.execute(model, 0.2, 0.0, 1.0, False).result[0], trajectory, guidance(tiny))
    with pytest.raises(ValueError, match="the MODEL of Virtual Inversion have two"):
        record(model, guidance(tiny), sampler_of(ONE_NOISE), trajectory.sigmas, tiny.image * 0 + 1, tiny.image, 0)
    with pytest.raises(ValueError, match="Virtual Inversion was given a MODEL that is already edited"):
        virtual(tiny, INFEDIT, model)


def test_the_node_through_a_whole_edit(demo: tuple) -> None:
    """At its defaults, from a picture: most of it stays, and the shape changes."""
    model, clip, vae = demo
    scene = scenes.parse(CAPTION, 3)
    image = torch.from_numpy(scenes.render(scene))[None]
    answer = torch.from_numpy(scenes.render(scenes.parse(CAPTION.replace(*CHANGE), 3)))[None]
    source, target, edit, _ = PromptEdit.execute(clip, CAPTION, CAPTION.replace(*CHANGE)).result
    model, trajectory, latent, sampler, _ = execute(VirtualInversion, model=model, source=source, image=image, vae=vae)
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    assert torch.equal(latent["samples"], vae.encode(image))
    (with_p2p,) = execute(P2PAttentionController, model=model, trajectory=trajectory, prompt_edit=edit)
    for edited in (model, with_p2p):
        inputs = {"model": edited, "trajectory": trajectory, "positive": target, "vae": vae, "negative": negative}
        _, picture = execute(EditSampler, **inputs, sampler=sampler, cfg=CFG)
        assert ((picture - answer) ** 2).mean() < 0.5 * ((image - answer) ** 2).mean()
