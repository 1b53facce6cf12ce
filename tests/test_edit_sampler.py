"""Edit Sampler: the same bits as the host's samplers wired to the trajectory by hand, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import comfy.samplers
import comfy.utils
import nodes
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import Sampler
from comfy_extras.nodes_custom_sampler import SamplerCustom
from torch import Tensor

from palimpsest.demo import scenes
from palimpsest.guidance.negative_prompt import LINEAR, Mixture
from palimpsest.guidance.proximal import INVERSION, Proximal
from palimpsest.host.branch.guided import attach_rule
from palimpsest.host.branch.negatives import attach_mixture
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.host.files.trajectory import Trajectory
from palimpsest.host.run.model import noise_latent
from palimpsest.inversion.null_text import Settings, null_text
from palimpsest.inversion.replay import invert_edict, invert_edit_friendly, invert_obelm
from palimpsest.inversion.run import Guidance, invert, resample
from palimpsest.nodes.exact import EDICTInversion, EditFriendlyInversion, OBELMInversion
from palimpsest.nodes.inversion import DDIMInversion
from palimpsest.nodes.p2p import P2PAttentionController
from palimpsest.nodes.prompt import PromptEdit
from palimpsest.nodes.sampler import EditSampler
from test_inject import PNP, masactrl
from test_local_blend import blend
from test_source import swap
from tiny import Tiny, conditioning, execute, rows_of, run, tiny_model

EULER = comfy.samplers.sampler_object("euler")
EMPTY = conditioning(6)

MODELS: dict[str, Callable[[Tiny], ModelPatcher]] = {
    "naive": lambda tiny: tiny.model,
    "p2p": lambda tiny: attach(tiny.model, tiny.trajectory, swap()),
    "pnp": lambda tiny: attach(tiny.model, tiny.trajectory, PNP),
    "masactrl": lambda tiny: attach(tiny.model, tiny.trajectory, masactrl(tiny)),
    "local blend": lambda tiny: attach_blend(
        attach(tiny.model, tiny.trajectory, swap()), tiny.trajectory, blend(tiny, start=0.2)
    ),
    "negative prompt": lambda tiny: attach_mixture(
        attach(tiny.model, tiny.trajectory, swap()), EMPTY, Mixture(0.75, LINEAR), tiny.trajectory
    ),
    "proximal": lambda tiny: attach_rule(
        attach(tiny.model, tiny.trajectory, swap()), Proximal(0.7, 0.5, 0.6, INVERSION), tiny.trajectory
    ),
}


def by_hand(
    model: ModelPatcher, trajectory: Trajectory, guidance: Guidance, sampler: Sampler = EULER, images: int = 1
) -> Tensor:
    """SamplerCustom with everything connected as it has to be."""
    latent = {"samples": noise_latent(model, trajectory).repeat(images, 1, 1, 1)}
    positive, negative, cfg = guidance
    sigmas = trajectory.sigmas.clone()
    return SamplerCustom.execute(model, False, 7, cfg, positive, negative, sampler, sigmas, latent)[0]["samples"]


def guidance_of(tiny: Tiny) -> Guidance:
    return Guidance(tiny.target, tiny.negative, 4.0)


@pytest.mark.parametrize("name", MODELS)
def test_equals_sampler_custom_bit_for_bit(tiny: Tiny, name: str) -> None:
    model = MODELS[name](tiny)
    ours = resample(model, tiny.trajectory, guidance_of(tiny), EULER)
    assert torch.equal(ours, by_hand(model, tiny.trajectory, guidance_of(tiny)))
    assert name == "naive" or not torch.equal(ours, resample(tiny.model, tiny.trajectory, guidance_of(tiny), EULER))


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun", "uni_pc"])
def test_equals_it_with_other_samplers(tiny: Tiny, sampler: str) -> None:
    model, chosen = MODELS["p2p"](tiny), comfy.samplers.sampler_object(sampler)
    ours = resample(model, tiny.trajectory, guidance_of(tiny), chosen)
    assert torch.equal(ours, by_hand(model, tiny.trajectory, guidance_of(tiny), chosen))


def test_equals_ksampler_advanced_bit_for_bit(tiny: Tiny) -> None:
    sigmas = comfy.samplers.calculate_sigmas(tiny.model.get_model_object("model_sampling"), "ddim_uniform", 5)
    trajectory = invert(tiny.model, Guidance(tiny.source, None, 1.0), tiny.image, sigmas)
    model = attach(tiny.model, trajectory, swap())
    latent = {"samples": noise_latent(model, trajectory)}
    run = nodes.KSamplerAdvanced().sample
    prompts = tiny.target, tiny.negative
    (theirs,) = run(model, "disable", 0, 5, 4.0, "euler", "ddim_uniform", *prompts, latent, 0, 10000, "disable")
    assert torch.equal(resample(model, trajectory, guidance_of(tiny), EULER), theirs["samples"])


def test_takes_the_negatives_of_null_text(tiny: Tiny) -> None:
    negative, found = null_text(tiny.model, tiny.trajectory, tiny.negative, Settings(4.0, inner_steps=2), True)
    guidance = Guidance(tiny.target, negative, 4.0)
    for model in (tiny.model, attach(tiny.model, found, swap())):
        assert torch.equal(resample(model, found, guidance, EULER), by_hand(model, found, guidance))


def test_takes_the_samplers_of_exact_inversions(tiny: Tiny) -> None:
    """Which give the image back where the prompt is the source's."""
    source = Guidance(tiny.source, tiny.negative, 3.0)
    for trajectory, sampler in (
        invert_edict(tiny.model, source, tiny.image, tiny.sigmas, 0.93),
        invert_edit_friendly(tiny.model, source, tiny.image, tiny.sigmas, 1.0, 0),
        invert_obelm(tiny.model, source, tiny.image, tiny.sigmas),
    ):
        back = resample(tiny.model, trajectory, source, sampler)
        assert (back - tiny.image).norm() < 1e-4 * tiny.image.norm()
        model = attach(tiny.model, trajectory, swap())
        ours = resample(model, trajectory, guidance_of(tiny), sampler)
        assert torch.equal(ours, by_hand(model, trajectory, guidance_of(tiny), sampler))


def test_several_targets_start_from_the_noise_each(tiny: Tiny) -> None:
    targets = [[torch.cat([conditioning(seed)[0][0] for seed in (2, 7, 8)]), {}]]
    guidance = Guidance(targets, tiny.negative, 4.0)
    ours = resample(tiny.model, tiny.trajectory, guidance, EULER)
    assert len(ours) == 3
    assert torch.equal(ours, by_hand(tiny.model, tiny.trajectory, guidance, images=3))


def test_a_batch_of_images_keeps_its_number() -> None:
    tiny = Tiny(batch=2)
    ours = resample(tiny.model, tiny.trajectory, guidance_of(tiny), EULER)
    assert torch.equal(ours, by_hand(tiny.model, tiny.trajectory, guidance_of(tiny)))
    assert len(ours) == 2


def test_progress_and_interrupts_are_the_hosts(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = MODELS["pnp"](tiny), []
    expected = resample(model, tiny.trajectory, guidance_of(tiny), EULER)

    def report(value: int, total: int, preview, **_) -> None:
        seen.append((value, total))
        if len(seen) > 1 and value == 1:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", report)
    resample(model, tiny.trajectory, guidance_of(tiny), EULER)
    assert (seen[0], seen[-1]) == ((1, 5), (5, 5))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        resample(model, tiny.trajectory, guidance_of(tiny), EULER)
    monkeypatch.undo()
    assert torch.equal(resample(model, tiny.trajectory, guidance_of(tiny), EULER), expected)


def test_refusals(tiny: Tiny) -> None:
    def sampled(model: ModelPatcher = tiny.model, sampler: str = "euler", cfg: float = 4.0) -> Tensor:
        guidance = Guidance(tiny.target, tiny.negative, cfg)
        return resample(model, tiny.trajectory, guidance, comfy.samplers.sampler_object(sampler))

    with pytest.raises(ValueError, match="'euler_ancestral' adds fresh noise at every step"):
        sampled(sampler="euler_ancestral")
    with pytest.raises(ValueError, match="trajectory was made with another model"):
        sampled(tiny_model(seed=9))
    with pytest.raises(ValueError, match="ended in NaN or infinite values: .*, or lower cfg"):
        sampled(cfg=float("inf"))


def test_the_node_through_a_whole_edit(demo: tuple) -> None:
    """An image with its VAE, or its latent; the picture is VAE Decode's; the negative is the source prompt's."""
    model, clip, vae = demo
    caption = "a photo of a cat on a meadow"
    image = torch.from_numpy(scenes.render(scenes.parse(caption, 3)))[None]
    source, target, edit, _ = PromptEdit.execute(clip, caption, caption.replace("cat", "dog")).result
    latent = {"samples": vae.encode(image)}
    trajectory, _, _ = execute(DDIMInversion, model=model, source=source, image=image, vae=vae, steps=4)
    plain, _, _ = execute(DDIMInversion, model=model, source=source, image=latent, steps=4)
    assert torch.equal(trajectory.states, plain.states)

    (edited,) = execute(P2PAttentionController, model=model, trajectory=trajectory, prompt_edit=edit)
    inputs = {"model": edited, "trajectory": trajectory, "positive": target, "vae": vae}
    result, picture = execute(EditSampler, **inputs)
    expected = by_hand(edited, trajectory, Guidance(target, source, 5.0))
    assert torch.equal(result["samples"], expected)
    assert torch.equal(picture, vae.decode(expected))
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    edited, rows = rows_of(edited)
    said = run(EditSampler, **inputs | {"model": edited}, negative=empty)
    result, _ = said.result
    assert (len(rows), sum(rows)) == (4, 12)  # a step's target, negative and source
    assert said.ui.as_dict()["text"][0].startswith("4 network evaluations, 12 rows, ")
    assert torch.equal(result["samples"], by_hand(edited, trajectory, Guidance(target, empty, 5.0)))
    assert not torch.equal(result["samples"], expected)


@pytest.mark.parametrize("node", [DDIMInversion, EDICTInversion, EditFriendlyInversion, OBELMInversion])
def test_an_image_without_a_vae_is_refused(tiny: Tiny, node) -> None:
    with pytest.raises(ValueError, match="Inversion was given an image but no vae: connect vae, or VAE Encode"):
        execute(node, model=tiny.model, source=tiny.source, image=torch.zeros(1, 64, 64, 3))
