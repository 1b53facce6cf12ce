"""Flow Edit on the host's flow transformers: the paper's loop in float64, and what it leaves exactly as it was."""

from __future__ import annotations

from collections.abc import Callable

import comfy.sample
import comfy.samplers
import nodes
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider, calc_cond_batch
from torch import Tensor

from flows import FLOWS, Flow
from palimpsest.host.sampler import OwnSampler, Run
from palimpsest.inversion.flow_edit import edit_image, edit_trajectory
from palimpsest.inversion.run import Guidance, ddim_sigmas, invert, resample
from palimpsest.inversion.virtual import PRESETS, invert_virtually, schedule
from palimpsest.nodes.flow_edit import FlowEdit
from tiny import execute

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


def paper(parts: Parts, noise: list[Tensor], source_cfg: float = 1.0, scale: float = 1.0, pull: float = 0.0) -> Tensor:
    """FlowEdit's algorithm 1 with n_avg 1 and n_min 0, and FlowAlign's pull."""

    def body(denoise: Denoise, image: Tensor) -> Tensor:
        def velocity(prompt: str, x: Tensor, sigma: float, cfg: float) -> Tensor:
            positive, negative = denoise(prompt, x, sigma), denoise("negative", x, sigma)
            return (x - (negative + cfg * (positive - negative))) / sigma

        edit, levels = image, parts.sigmas.double().tolist()
        for sigma, below, n in zip(levels, levels[1:], noise, strict=False):
            source = (1 - sigma) * image + sigma * scale * n
            target = edit + source - image
            v_source, v_target = (
                velocity("source", source, sigma, source_cfg),
                velocity("positive", target, sigma, CFG),
            )
            moved = (below - sigma) * (v_target - v_source)
            d_source, d_target = source - sigma * v_source, target - sigma * v_target
            edit = edit + moved + pull * (d_source - d_target)
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
