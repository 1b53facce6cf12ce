"""Where a run may begin on a trajectory, through the host's own sampler nodes: right, or refused in a true sentence."""

from __future__ import annotations

from collections.abc import Callable

import comfy.samplers
import nodes
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfy_extras.nodes_custom_sampler import DisableNoise, RandomNoise, SamplerCustom, SamplerCustomAdvanced
from torch import Tensor

from palimpsest.nodes.exact import EDICTInversion, EditFriendlyInversion, OBELMInversion
from palimpsest.nodes.inversion import DDIMInversion, RecordTrajectory
from palimpsest.nodes.p2p import P2PAttentionController
from test_alignment import edit_of
from tiny import Tiny, conditioning, execute

STEPS = 20
UNIFORM = "ddim_uniform"  # at 20 steps it has the sigmas of DDIM Inversion


class Edit:
    """One edit, sampled by the nodes that people have."""

    def __init__(self) -> None:
        prompt_edit = edit_of("a cat", ["a dog"], width=64)
        source, self.target = (
            [[embedding, {}]] for embedding in (prompt_edit.embeddings[0], prompt_edit.embeddings[1])
        )
        self.tiny = Tiny(steps=STEPS, source=source, target=self.target)
        parts = {"model": self.tiny.model, "trajectory": self.tiny.trajectory, "prompt_edit": prompt_edit}
        (self.model,) = execute(P2PAttentionController, **parts)
        self.prompts = self.target, conditioning(3)
        self.noise, self.image = {"samples": self.tiny.noise}, {"samples": self.tiny.image}

    def ksampler(self, steps: int, scheduler: str = UNIFORM, latent: dict | None = None, denoise: float = 1) -> Tensor:
        parts = (1, steps, 4.0, "euler", scheduler, *self.prompts, latent or self.noise, denoise)
        (samples,) = nodes.KSampler().sample(self.model, *parts)
        return samples["samples"]

    def advanced(
        self,
        steps: int = STEPS,
        sampler: str = "euler",
        latent: dict | None = None,
        start: int = 0,
        end: int = 10000,
        add_noise: str = "disable",
        leftover: str = "disable",
        model: ModelPatcher | None = None,
    ) -> Tensor:
        parts = (add_noise, 1, steps, 4.0, sampler, UNIFORM, *self.prompts, latent or self.noise, start, end, leftover)
        (samples,) = nodes.KSamplerAdvanced().sample(model or self.model, *parts)
        return samples["samples"]

    def custom(self, sampler: str = "euler", sigmas: Tensor | None = None, add_noise: bool = False) -> Tensor:
        sigmas = self.tiny.sigmas if sigmas is None else sigmas
        sampler_object = comfy.samplers.sampler_object(sampler)
        output = SamplerCustom.execute(
            self.model, add_noise, 1, 4.0, *self.prompts, sampler_object, sigmas.clone(), self.noise
        )
        return output.result[0]["samples"]

    def custom_advanced(self, noise: object) -> Tensor:
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(*self.prompts)
        guider.set_cfg(4.0)
        output = SamplerCustomAdvanced.execute(
            noise, guider, comfy.samplers.sampler_object("euler"), self.tiny.sigmas, self.noise
        )
        return output.result[0]["samples"]

    def halves(self) -> Tensor:
        first = self.advanced(end=STEPS // 2, leftover="enable")
        return self.advanced(latent={"samples": first}, start=STEPS // 2)


@pytest.fixture(scope="module")
def edit() -> Edit:
    with torch.inference_mode():
        return Edit()


NOISE_ADDED = r"does not start from .* own noise: .* \(KSampler always adds noise\), or in .* with DisableNoise\."
FEWER = "runs {} steps and the trajectory has 20, so it starts at the sigma of step {} but from the noise of step 0: "
LATER = r"starts at step 10 but from the noise of step 0: start at step 0 \(start_at_step 0, denoise 1, all of SIGMAS\)"
OTHER_NOISE = "starts at step 10 of the trajectory, but not with the noise that the source has there: start at step 0"

REFUSED: dict[str, tuple[Callable[[Edit], Tensor], str]] = {
    "KSampler": (lambda edit: edit.ksampler(STEPS), NOISE_ADDED),
    "KSampler, its default schedule": (lambda edit: edit.ksampler(STEPS, "simple"), NOISE_ADDED),
    "SamplerCustom, noise": (lambda edit: edit.custom(add_noise=True), NOISE_ADDED),
    "RandomNoise": (lambda edit: edit.custom_advanced(RandomNoise.execute(1).result[0]), NOISE_ADDED),
    "fewer steps": (lambda edit: edit.advanced(10), FEWER.format(10, 1)),
    "fewer steps, from the middle": (lambda edit: edit.advanced(10, start=5), FEWER.format(5, 11)),
    "more steps": (
        lambda edit: edit.advanced(40),
        "schedule has sigma .* trajectory of 20 steps lacks: use Edit Sampler, or connect the",
    ),
    "from the middle": (lambda edit: edit.advanced(start=10), LATER),
    "the end of SIGMAS": (lambda edit: edit.custom(sigmas=edit.tiny.sigmas[10:]), LATER),
    "image to image": (lambda edit: edit.ksampler(10, latent=edit.image, denoise=0.5), OTHER_NOISE),
    "image to image of the noise": (lambda edit: edit.ksampler(10, denoise=0.5), NOISE_ADDED),
    "image to image, advanced": (
        lambda edit: edit.advanced(latent=edit.image, start=10, add_noise="enable"),
        OTHER_NOISE,
    ),
    "image to image, late": (
        lambda edit: edit.advanced(latent=edit.image, start=18, add_noise="enable"),
        OTHER_NOISE.replace("10", "18"),
    ),
    "no noise at all": (lambda edit: edit.advanced(latent=edit.image, start=10), OTHER_NOISE),
    "dpm_2": (lambda edit: edit.advanced(sampler="dpm_2"), "'dpm_2' calls the model between the sigmas"),
    "dpm_2, SamplerCustom": (lambda edit: edit.custom("dpm_2"), "'dpm_2' calls the model between the sigmas"),
    "uni_pc": (lambda edit: edit.advanced(sampler="uni_pc"), "takes a sigma out of any schedule for 'uni_pc', so"),
    "uni_pc_bh2": (
        lambda edit: edit.advanced(sampler="uni_pc_bh2"),
        "takes a sigma .* for 'uni_pc_bh2', so choose euler",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_fit_is_told_what_to_do(edit: Edit, case: str) -> None:
    run, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        run(edit)


@pytest.mark.parametrize(
    "node", [DDIMInversion, EditFriendlyInversion, EDICTInversion, OBELMInversion, RecordTrajectory]
)
def test_a_noise_mask_is_not_dropped_without_a_word(edit: Edit, node: type[io.ComfyNode]) -> None:
    masked = {**edit.image, "noise_mask": torch.zeros(1, 64, 64)}
    parts = {"model": edit.tiny.model, "source": edit.target, "image": masked, "negative": edit.prompts[1], "steps": 4}
    if node is RecordTrajectory:
        euler = comfy.samplers.sampler_object("euler")
        parts = {"model": edit.tiny.model, "positive": edit.target, "negative": edit.prompts[1], "latent_image": masked}
        parts |= {"sampler": euler, "sigmas": edit.tiny.sigmas}
    with pytest.raises(ValueError, match=f"noise mask, which {node.GET_SCHEMA().display_name} does not know: remove"):
        execute(node, **parts)


def test_what_the_sentences_advise_works(edit: Edit) -> None:
    """Each fits, and gives one edit: with every host node, in one run or in two."""
    plain = edit.advanced(model=edit.tiny.model)
    edited = edit.advanced()
    assert (edited - plain).norm() > 1e-2 * plain.norm()
    others = {
        "SamplerCustom": edit.custom(),
        "DisableNoise": edit.custom_advanced(DisableNoise.execute().result[0]),
        "two halves": edit.halves(),
    }
    for name, other in others.items():  # that of KSampler Advanced ends at sigma 0, SIGMAS a little before
        assert (other - edited).norm() < 5e-3 * edited.norm(), name
    assert torch.isfinite(edit.custom("uni_pc")).all()
