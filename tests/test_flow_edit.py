"""Flow Edit on the host's flow transformers: the paper's loop in float64, and what it leaves exactly as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import comfy.sample
import comfy.samplers
import nodes
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider, calc_cond_batch
from torch import Tensor

from flows import FLOWS, Flow
from palimpsest.host.branch.virtual import attach_virtual, virtual_of
from palimpsest.host.run.cost import metered
from palimpsest.host.run.sampler import OwnSampler, Run
from palimpsest.inversion.diffedit import RunRegion
from palimpsest.inversion.flow_edit import edit_image, edit_trajectory
from palimpsest.inversion.run import Guidance, ddim_sigmas, invert, resample
from palimpsest.inversion.virtual import PRESETS, invert_virtually, schedule
from palimpsest.nodes.diffedit import DifferenceMask
from palimpsest.nodes.flow_edit import FlowEdit
from tiny import Tiny, execute

STEPS, CFG, SEED = 5, 3.0, 7
every_flow = pytest.mark.parametrize("flow", FLOWS.values(), ids=list(FLOWS))

Denoise = Callable[[str, Tensor, float], Tensor]
"""Takes the name of a prompt, x in float64 and sigma; returns the denoised estimate in float64."""


class Loop(OwnSampler):
    """Runs a loop written out plainly on the unedited model."""

    def __init__(self, body: Callable[[Denoise, Tensor], Tensor]) -> None:
        self.body = body

    def walk(self, run: Run) -> Tensor:
        def denoise(prompt: str, x: Tensor, sigma: float) -> Tensor:
            conds, x = run.guider.conds[prompt], x.to(run.latent)
            model, sigmas = run.guider.inner_model, x.new_full((len(x),), sigma)
            return calc_cond_batch(model, [conds], x, sigmas, run.model_options)[0].double()

        return self.body(denoise, run.latent.double()).float()


class Parts:
    """A flow model, its prompts, of unequal length, and an image."""

    def __init__(self, flow: Flow) -> None:
        self.model = flow.make()
        self.source, self.target, self.negative = (flow.prompt(*made) for made in ((1, 4), (2, 6), (3, 5)))
        self.image = torch.randn(flow.latent, generator=torch.Generator().manual_seed(4))
        self.sigmas = ddim_sigmas(self.model, STEPS)

    def loop(self, body: Callable[[Denoise, Tensor], Tensor]) -> Tensor:
        guider = CFGGuider(self.model)
        prompts = {"positive": self.target, "negative": self.negative, "source": self.source}
        guider.inner_set_conds(prompts)
        noise = torch.zeros_like(self.image)
        return guider.sample(noise, self.image, Loop(body), self.sigmas, disable_pbar=True, seed=0)

    def sample(self, model: ModelPatcher, cfg: float = CFG, sampler: str = "euler", **changes) -> Tensor:
        parts = {"noise": comfy.sample.prepare_noise(self.image, SEED), "sigmas": self.sigmas, "latent": self.image}
        parts |= {"positive": self.target, "mask": None} | changes
        return comfy.sample.sample_custom(
            model,
            parts["noise"],
            cfg,
            comfy.samplers.sampler_object(sampler),
            parts["sigmas"],
            parts["positive"],
            self.negative,
            parts["latent"],
            noise_mask=parts["mask"],
            disable_pbar=True,
            seed=SEED,
        )


def noises(image: Tensor, steps: int) -> list[Tensor]:
    """The sampler's own, by its seed, and those of the further steps."""
    later = torch.Generator().manual_seed(SEED + 1)
    first = comfy.sample.prepare_noise(image, SEED).double()
    return [first, *(torch.randn(image.shape, generator=later).double() for _ in range(steps - 1))]


def paper(
    parts: Parts,
    noise: list[Tensor],
    source_cfg: float = 1.0,
    scale: float = 1.0,
    pull: float = 0.0,
    confined: tuple[float, int] | None = None,
) -> Tensor:
    """FlowEdit's algorithm 1 with n_avg 1 and n_min 0, and FlowAlign's pull.

    confined: DiffEdit's threshold, and from the end of which step on the image is put back outside its mask.
    """

    def body(denoise: Denoise, image: Tensor) -> Tensor:
        def velocity(prompt: str, x: Tensor, sigma: float, cfg: float) -> Tensor:
            positive, negative = denoise(prompt, x, sigma), denoise("negative", x, sigma)
            return (x - (negative + cfg * (positive - negative))) / sigma

        edit, levels = image, parts.sigmas.double().tolist()
        strength = torch.zeros(image.shape[-2:]).double()
        for i, (sigma, below, n) in enumerate(zip(levels, levels[1:], noise, strict=False)):
            source = (1 - sigma) * image + sigma * scale * n
            target = edit + source - image
            v_source, v_target = (
                velocity("source", source, sigma, source_cfg),
                velocity("positive", target, sigma, CFG),
            )
            moved = (below - sigma) * (v_target - v_source)
            d_source, d_target = source - sigma * v_source, target - sigma * v_target
            edit = edit + moved + pull * (d_source - d_target)
            if confined is not None:
                threshold, last = confined
                if i <= last:
                    apart = denoise("positive", target, sigma) - denoise("source", source, sigma)
                    strength = strength + apart.abs().flatten(1, -3).mean(1)
                if i >= last:
                    mask = (strength / (3 * strength.mean())).clamp(max=1) > threshold
                    edit = torch.where(mask, edit, image)
        return edit

    return parts.loop(body)


def close(ours: Tensor, theirs: Tensor, relative: float = 2e-4) -> bool:
    return bool((ours - theirs).abs().max() <= relative * theirs.abs().max())


@every_flow
@pytest.mark.parametrize("source_cfg", [1.0, 2.0])
def test_equals_the_papers_loop(flow: Flow, source_cfg: float) -> None:
    parts = Parts(flow)
    scale = getattr(parts.model.get_model_object("model_sampling"), "noise_scale", 1.0)
    ours = parts.sample(edit_image(parts.model, parts.source, parts.image, cfg=source_cfg))
    assert close(ours, paper(parts, noises(parts.image, STEPS), source_cfg, scale))
    assert not close(ours, parts.image, 0.05)


@every_flow
def test_noise_of_one_kind_and_flowaligns_pull(flow: Flow) -> None:
    parts = Parts(flow)
    scale = getattr(parts.model.get_model_object("model_sampling"), "noise_scale", 1.0)
    ours = parts.sample(edit_image(parts.model, parts.source, parts.image, fresh=False, pull=0.05))
    first, *_ = noises(parts.image, 1)
    assert close(ours, paper(parts, [first] * STEPS, 1.0, scale, pull=0.05))
    assert not close(ours, paper(parts, [first] * STEPS, 1.0, scale))


@every_flow
def test_the_same_prompt_gives_the_image_back(flow: Flow) -> None:
    parts = Parts(flow)
    edited = edit_image(parts.model, parts.source, parts.image)
    assert close(parts.sample(edited, cfg=1.0, positive=parts.source), parts.image, 1e-4)


@every_flow
def test_outside_a_noise_mask_is_the_image(flow: Flow) -> None:
    parts = Parts(flow)
    edited = edit_image(parts.model, parts.source, parts.image)
    mask = torch.zeros(1, 1, *flow.latent[-2:])
    mask[..., : flow.latent[-1] // 2] = 1
    result = parts.sample(edited, mask=mask)
    half = flow.latent[-1] // 2
    assert torch.equal(result[..., half:], parts.image[..., half:])
    assert not close(result[..., :half], parts.image[..., :half], 0.05)


@every_flow
def test_plain_ksampler_of_an_img2img_workflow(flow: Flow) -> None:
    """Its denoise is where the paper starts, n_max of T steps: here the last 5 of 8."""
    parts = Parts(flow)
    edited, latent = execute(FlowEdit, model=parts.model, source=parts.source, image={"samples": parts.image})
    (result,) = nodes.KSampler().sample(
        edited, SEED, STEPS, CFG, "euler", "simple", parts.target, parts.negative, latent, denoise=5 / 8
    )
    sampling = parts.model.get_model_object("model_sampling")
    parts.sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 8)[-STEPS - 1 :].cpu()
    scale = getattr(sampling, "noise_scale", 1.0)
    assert close(result["samples"], paper(parts, noises(parts.image, STEPS), 1.0, scale))


@every_flow
def test_rows_of_a_step(flow: Flow) -> None:
    """The source costs one row, two where it is guided."""
    parts = Parts(flow)

    def rows(model: ModelPatcher, cfg: float) -> float:
        model, cost = metered(model)
        parts.sample(model, cfg)
        return sum(cost.rows) / STEPS

    edited = edit_image(parts.model, parts.source, parts.image)
    assert (rows(edited, 1.0), rows(edited, CFG)) == (2, 3)
    assert rows(edit_image(parts.model, parts.source, parts.image, cfg=2.0), CFG) == 4


@every_flow
def test_following_a_trajectory_adds_what_the_sources_own_steps_lack(flow: Flow) -> None:
    """x' = x + (s' - s) v(x, target) + [y' - y - (s' - s) v(y, source)] along the source's states y."""
    parts = Parts(flow)
    trajectory = invert(parts.model, Guidance(parts.source), parts.image, parts.sigmas)
    result = parts.sample(edit_trajectory(parts.model, trajectory))

    def body(denoise: Denoise, image: Tensor) -> Tensor:
        levels, states = trajectory.sigmas.double().tolist(), trajectory.states.double()
        x = states[0]
        for i, (sigma, below) in enumerate(zip(levels, levels[1:], strict=False)):
            positive, negative = denoise("positive", x, sigma), denoise("negative", x, sigma)
            v_target = (x - (negative + CFG * (positive - negative))) / sigma
            v_source = (states[i] - denoise("source", states[i], sigma)) / sigma
            lacking = states[i + 1] - states[i] - (below - sigma) * v_source
            x = x + (below - sigma) * v_target + lacking
        return x

    assert close(result, parts.loop(body))
    noiseless = parts.sample(edit_trajectory(parts.model, trajectory), noise=torch.zeros_like(parts.image))
    assert torch.equal(noiseless, result)
    edited, latent = execute(FlowEdit, model=parts.model, image=trajectory)
    assert torch.equal(parts.sample(edited, latent=latent["samples"]), result)
    assert torch.equal(resample(edited, trajectory, Guidance(parts.target, parts.negative, CFG)), result)


@every_flow
def test_other_presets_of_virtual_inversion(flow: Flow) -> None:
    """InfEdit: the source anew from the image, the target at its clean one. Edit-friendly: the source's noise maps."""
    parts = Parts(flow)
    sigmas = schedule(parts.model, "simple", STEPS, 0.8)
    levels = sigmas.double().tolist()
    sampling = parts.model.get_model_object("model_sampling")
    scale = getattr(sampling, "noise_scale", 1.0)
    for name in ("InfEdit", "edit-friendly"):
        model, trajectory = invert_virtually(parts.model, parts.source, parts.image, sigmas, seed=SEED)
        drawn = [torch.randn(flow.latent, generator=torch.Generator().manual_seed(9 + i)) for i in range(STEPS)]
        left = list(drawn)
        sampler = comfy.samplers.ksampler(PRESETS[name].sampler, {"noise_sampler": lambda *_, left=left: left.pop(0)})
        ours = resample(model, trajectory, Guidance(parts.target, parts.negative, CFG), sampler)
        noise = [comfy.sample.prepare_noise(parts.image, SEED).double(), *(n.double() for n in drawn)]

        def body(denoise: Denoise, image: Tensor, name: str = name, noise: list[Tensor] = noise) -> Tensor:
            def guided(x: Tensor, sigma: float) -> Tensor:
                positive, negative = denoise("positive", x, sigma), denoise("negative", x, sigma)
                return negative + CFG * (positive - negative)

            source = target = (1 - levels[0]) * image + levels[0] * scale * noise[0]
            for i, (sigma, below) in enumerate(zip(levels, levels[1:], strict=False)):
                clean = image + guided(target, sigma) - denoise("source", source, sigma)
                if below == 0:
                    return clean
                if name == "InfEdit":
                    added = below * scale * noise[i + 1]
                    source, target = (1 - below) * image + added, (1 - below) * clean + added
                    continue
                down = below * below / sigma  # eta 1
                fade = (1 - below) / (1 - down)
                added = (below**2 - (fade * down) ** 2) ** 0.5 * scale * noise[i + 1]
                source, target = (
                    fade * (down / sigma * x + (1 - down / sigma) * toward) + added
                    for x, toward in ((source, image), (target, clean))
                )
            raise AssertionError("the schedule ends at 0")

        assert close(ours, parts.loop(body)), name


@every_flow
def test_inside_the_mask_that_the_two_prompts_make(flow: Flow) -> None:
    """Difference Mask, Set Latent Noise Mask, Flow Edit: outside the image is exactly as it was."""
    parts = Parts(flow)
    inputs = {"model": parts.model, "source": parts.source, "target": parts.target}
    (mask,) = execute(DifferenceMask, **inputs, image={"samples": parts.image}, noises=3, threshold=0.34)
    assert mask.shape == (1, 8 * flow.latent[-2], 8 * flow.latent[-1])
    assert 0.02 < mask.mean() < 0.98
    (masked,) = nodes.SetLatentNoiseMask().set_mask({"samples": parts.image}, mask)
    edited, latent = execute(FlowEdit, model=parts.model, source=parts.source, image=masked)
    result = parts.sample(edited, mask=latent["noise_mask"], latent=latent["samples"])
    outside = mask[:, ::8, ::8].expand_as(result) == 0
    assert torch.equal(result[outside], parts.image[outside])
    assert not close(result[~outside], parts.image[~outside], 0.05)


@every_flow
@pytest.mark.parametrize("fresh", [True, False])
def test_confined_to_where_the_predictions_differ(flow: Flow, fresh: bool) -> None:
    """By the first 3 of 5 steps; from there on the rest is the image, at the end to the bit."""
    parts = Parts(flow)
    scale = getattr(parts.model.get_model_object("model_sampling"), "noise_scale", 1.0)
    drawn = noises(parts.image, STEPS) if fresh else noises(parts.image, 1) * STEPS
    region = RunRegion(threshold=0.34, until=0.6)
    result = parts.sample(edit_image(parts.model, parts.source, parts.image, fresh, region=region))
    assert close(result, paper(parts, drawn, 1.0, scale, confined=(0.34, 2)))
    kept = (result == parts.image).all(1)
    assert 0.1 < kept.float().mean() < 0.9
    if result.ndim == 5:
        assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert not close(result, paper(parts, drawn, 1.0, scale), 0.05)


def test_confined_along_a_trajectory_within_a_mask_and_for_several_targets() -> None:
    parts = Parts(FLOWS["Flux"])
    region = RunRegion(threshold=0.34, until=0.6)
    edited = edit_image(parts.model, parts.source, parts.image, region=region)
    alone = parts.sample(edited)
    inputs = {"model": parts.model, "source": parts.source, "image": {"samples": parts.image}}
    by_node, _ = execute(FlowEdit, **inputs, confine=0.34, confine_after=0.6)
    assert torch.equal(parts.sample(by_node), alone)
    noise = comfy.sample.prepare_noise(parts.image, SEED).repeat(2, 1, 1, 1)
    both = parts.sample(edited, noise=noise, latent=parts.image.repeat(2, 1, 1, 1))
    assert close(both, alone.expand_as(both), 1e-5)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    within = parts.sample(edited, mask=mask)
    kept = (within == parts.image).all(1)
    assert kept[..., 4:].all()
    assert 0 < kept[..., :4].float().mean() < 1
    trajectory = invert(parts.model, Guidance(parts.source), parts.image, parts.sigmas)
    free, confined = (
        parts.sample(edit_trajectory(parts.model, trajectory, region=one), latent=parts.image) for one in (None, region)
    )
    kept = (confined == parts.image).all(1)
    assert 0.1 < kept.float().mean() < 0.9
    assert not (free == parts.image).all(1).any()


@pytest.mark.parametrize("sampler", ["lcm", "euler_ancestral"])
def test_confined_under_other_samplers(sampler: str) -> None:
    """With the sampler's own noise, which the source is found from even where the edit was put back."""
    parts = Parts(FLOWS["Flux"])
    region = RunRegion(threshold=0.34, until=0.6)
    model, trajectory = invert_virtually(parts.model, parts.source, parts.image, parts.sigmas, seed=SEED)
    virtual = replace(virtual_of(model), region=region)
    confined = attach_virtual(parts.model, trajectory, virtual)
    kept = (parts.sample(confined, sampler=sampler) == parts.image).all(1)
    assert 0.1 < kept.float().mean() < 0.9
    everywhere = attach_virtual(parts.model, trajectory, replace(virtual, region=RunRegion(-1.0, 0.6)))
    free = parts.sample(model, sampler=sampler)
    assert close(parts.sample(everywhere, sampler=sampler), free, 1e-5)
    assert torch.equal(parts.sample(model, sampler=sampler), free)


def test_refusals() -> None:
    parts = Parts(FLOWS["Flux"])
    edited = edit_image(parts.model, parts.source, parts.image)
    with pytest.raises(ValueError, match="The sampler 'dpmpp_2m' mixes more into a step .* which Flow Edit cannot"):
        parts.sample(edited, sampler="dpmpp_2m")
    with pytest.raises(ValueError, match="latent_image is not the image of Flow Edit"):
        parts.sample(edited, latent=parts.image.flip(-1))
    with pytest.raises(ValueError, match="adds no noise to the image, without which Flow Edit changes nothing"):
        parts.sample(edited, noise=torch.zeros_like(parts.image))
    with pytest.raises(ValueError, match="already edited"):
        edit_image(edited, parts.source, parts.image)
    with pytest.raises(ValueError, match="Flow Edit was given an image but no source"):
        execute(FlowEdit, model=parts.model, image={"samples": parts.image})
    trajectory = invert(parts.model, Guidance(parts.source), parts.image, parts.sigmas)
    followed = edit_trajectory(parts.model, trajectory)
    with pytest.raises(ValueError, match="sigma 0.875, which the trajectory that Flow Edit follows lacks"):
        parts.sample(followed, sigmas=ddim_sigmas(parts.model, 8))


def test_several_targets_of_one_image() -> None:
    parts = Parts(FLOWS["SD3"])
    edited = edit_image(parts.model, parts.source, parts.image)
    alone = parts.sample(edited)
    noise = comfy.sample.prepare_noise(parts.image, SEED).repeat(2, 1, 1, 1)
    both = parts.sample(edited, noise=noise, latent=parts.image.repeat(2, 1, 1, 1))
    assert close(both, alone.expand_as(both), 1e-5)


def test_works_on_unets_too() -> None:
    tiny = Tiny()
    edited, latent = execute(FlowEdit, model=tiny.model, source=tiny.source, image={"samples": tiny.image})
    noise = comfy.sample.prepare_noise(tiny.image, SEED)
    ours = comfy.sample.sample_custom(
        edited,
        noise,
        CFG,
        comfy.samplers.sampler_object("euler"),
        schedule(tiny.model, "simple", STEPS, 0.6),
        tiny.target,
        tiny.negative,
        latent["samples"],
        disable_pbar=True,
        seed=SEED,
    )
    sigmas = schedule(tiny.model, "simple", STEPS, 0.6)
    model, trajectory = invert_virtually(tiny.model, tiny.source, tiny.image, sigmas, fresh=True, seed=SEED)
    assert torch.equal(ours, resample(model, trajectory, Guidance(tiny.target, tiny.negative, CFG)))
