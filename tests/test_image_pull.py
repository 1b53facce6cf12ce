"""RF-Inversion's controller against its own loop in float64, on flow models and UNets; what it leaves as it was."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from flows import FLOWS, Flow
from palimpsest.attention.masactrl import MasaCtrl
from palimpsest.guidance.rf_inversion import ImagePull
from palimpsest.host.branch.blocks import attention_layers
from palimpsest.host.branch.concepts import attach_concept
from palimpsest.host.branch.pulled import attach_pull
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.inversion.flow_edit import edit_image
from palimpsest.inversion.run import Guidance, invert, resample
from palimpsest.nodes.pull import ImagePullNode
from reference import in_float64
from test_concepts import concept
from test_flow_edit import CFG, Denoise, Parts, close, every_flow
from test_local_blend import blend
from tiny import Tiny, execute, tiny_model

ALL_THROUGH = {"eta": 1.0, "start": 0.0, "end": 1.0}


@pytest.mark.parametrize(("decay", "etas"), [(False, [0, 0.9, 0.9, 0, 0]), (True, [0, 0.72, 0.54, 0, 0])])
@every_flow
def test_equals_the_controlled_ode(flow: Flow, decay: bool, etas: list[float]) -> None:
    """v + eta (v_image - v), v_image = (x - image) / sigma, in steps 1 and 2 of 5, from inverted noise."""
    parts = Parts(flow)
    trajectory = invert(parts.model, Guidance(parts.source), parts.image, parts.sigmas)
    (pulled,) = execute(
        ImagePullNode, model=parts.model, image={"samples": parts.image}, eta=0.9, start=0.2, end=0.6, decay=decay
    )
    guidance = Guidance(parts.target, parts.negative, CFG)
    ours = resample(pulled, trajectory, guidance)

    def body(denoise: Denoise, image: Tensor) -> Tensor:
        x, levels = trajectory.states[0].double(), parts.sigmas.double().tolist()
        for sigma, below, eta in zip(levels, levels[1:], etas, strict=False):
            positive, negative = denoise("positive", x, sigma), denoise("negative", x, sigma)
            v = (x - negative - CFG * (positive - negative)) / sigma
            v = v + eta * ((x - image) / sigma - v)
            x = x + (below - sigma) * v
        return x

    assert close(ours, parts.loop(body))
    assert not close(ours, resample(parts.model, trajectory, guidance), 0.05)


@pytest.mark.parametrize("kind", [ModelType.EPS, ModelType.V_PREDICTION])
def test_equals_the_controlled_ode_on_unets(kind: ModelType) -> None:
    """In the sampler's space, where the velocity is the noise: eps + eta ((x - image) / sigma - eps)."""
    tiny = Tiny(model=tiny_model(kind))
    (pulled,) = execute(ImagePullNode, model=tiny.model, image=tiny.trajectory, end=0.4)
    _, predicted = in_float64(tiny.model)
    x, image, levels = *tiny.trajectory.states[[0, -1]].double(), tiny.sigmas.double()
    for i, (sigma, below) in enumerate(zip(levels, levels[1:], strict=False)):
        positive, negative = (predicted(x, sigma, prompt, {}) for prompt in (tiny.target, tiny.negative))
        eps = negative + CFG * (positive - negative)
        eta = 0.9 if i < 2 else 0.0
        x = x + (below - sigma) * (eps + eta * ((x - image) / sigma - eps))
    expected = tiny.model.model.process_latent_out(x.float())
    assert close(tiny.sample(pulled, cfg=CFG), expected, 1e-4)


@pytest.mark.parametrize("name", ["Flux", "Wan"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_nothing_and_everything(name: str, sampler: str) -> None:
    """Eta 0 and a window between two steps change no bit; eta 1 throughout gives the image, from any noise."""
    parts = Parts(FLOWS[name])
    plain = parts.sample(parts.model, sampler=sampler)
    image = {"samples": parts.image}

    def sample(**settings: float) -> Tensor:
        (pulled,) = execute(ImagePullNode, model=parts.model, image=image, **settings)
        return parts.sample(pulled, sampler=sampler)

    assert torch.equal(sample(eta=0.0), plain)
    assert torch.equal(sample(start=0.45, end=0.55), plain)
    assert close(sample(**ALL_THROUGH), parts.image, 1e-6)
    assert torch.equal(parts.sample(parts.model, sampler=sampler), plain)


def test_fractions_are_of_the_run() -> None:
    """Also where a sampler asks between its steps: heun's second call lies within the step before the next."""
    pull, steps = ImagePull(0.9, 0.2, 0.6, False), 10
    acting = [step for step in range(steps) if pull.at(step / steps)]
    assert acting == [2, 3, 4, 5]
    parts = Parts(FLOWS["Flux"])
    asked: list[float] = []

    class Noting:
        def pulled(self, denoised: Tensor, image: Tensor, fraction: float) -> Tensor:
            asked.append(fraction)
            return denoised

    parts.sample(attach_pull(parts.model, parts.image, Noting()), sampler="heun")
    assert asked == pytest.approx([0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8])


def test_each_image_of_a_batch_to_its_own() -> None:
    parts = Parts(FLOWS["SD3"])
    images = torch.cat([parts.image, parts.image.flip(-1)])
    noise = comfy.sample.prepare_noise(images, 0)

    def sample(images: Tensor, noise: Tensor) -> Tensor:
        (pulled,) = execute(ImagePullNode, model=parts.model, image={"samples": images})
        return parts.sample(pulled, noise=noise, latent=torch.zeros_like(noise))

    both = sample(images, noise)
    for i in range(2):
        assert close(both[i : i + 1], sample(images[i : i + 1], noise[i : i + 1]), 1e-4)
    shared = sample(parts.image, noise)
    assert close(shared[:1], both[:1], 1e-4)
    assert not close(shared[1:], both[1:], 0.05)


@pytest.mark.parametrize("first", [True, False])
def test_beside_edits(first: bool) -> None:
    """In any order with MasaCtrl and Local Blend, the same bits; outside the blend's mask the image."""
    parts = Parts(FLOWS["Flux"])
    trajectory = invert(parts.model, Guidance(parts.source), parts.image, parts.sigmas)
    guidance = Guidance(parts.target, parts.negative, CFG)
    layers = frozenset(attention_layers(parts.model.model.diffusion_model))
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :4] = 1

    def pulled(model):
        return execute(ImagePullNode, model=model, image=trajectory)[0]

    def edited(model):
        model = attach(model, trajectory, MasaCtrl(layers, 0.0, False, None))
        return attach_blend(model, trajectory, blend(phrases=None, user=mask, start=0.0))

    one = pulled(edited(parts.model)) if first else edited(pulled(parts.model))
    result = resample(one, trajectory, guidance)
    assert torch.equal(result, resample(edited(pulled(parts.model)), trajectory, guidance))
    source = parts.model.model.process_latent_out(trajectory.states[-1])
    assert torch.equal(result[..., 4:], source[..., 4:])
    for other in (pulled(parts.model), edited(parts.model)):
        assert not close(result, resample(other, trajectory, guidance), 0.02)


@pytest.mark.parametrize("first", [True, False])
def test_concepts_are_pulled_too(first: bool) -> None:
    """Concept Guidance adds to the estimate that is drawn to the image, whichever node comes first."""
    tiny = Tiny()

    def pulled(model: ModelPatcher) -> ModelPatcher:
        return execute(ImagePullNode, model=model, image=tiny.trajectory, **ALL_THROUGH)[0]

    both = attach_concept(pulled(tiny.model), concept()) if first else pulled(attach_concept(tiny.model, concept()))
    to_the_end = torch.cat([tiny.sigmas[:-1], torch.zeros(1)])
    assert close(tiny.sample(both, sigmas=to_the_end), tiny.image, 1e-6)


def test_refusals() -> None:
    parts = Parts(FLOWS["Flux"])
    image = {"samples": parts.image}
    edited = edit_image(parts.model, parts.source, parts.image)
    (both,) = execute(ImagePullNode, model=edited, image=image)
    with pytest.raises(ValueError, match="Image Pull draws sampling to an image, which a MODEL of Flow Edit"):
        parts.sample(both)
    (pulled,) = execute(ImagePullNode, model=parts.model, image=image)
    with pytest.raises(ValueError, match="Image Pull draws sampling to an image, which a MODEL of Flow Edit"):
        parts.sample(edit_image(pulled, parts.source, parts.image))
    larger = torch.zeros(1, 16, 8, 12)
    with pytest.raises(ValueError, match=r"latents of shape \[1, 16, 8, 8\] but the sampler's are \[1, 16, 8, 12\]"):
        parts.sample(pulled, noise=larger, latent=larger)
    with pytest.raises(ValueError, match=r"another node's guidance \(Image Pull\), which bends the path"):
        invert(pulled, Guidance(parts.source), parts.image, parts.sigmas)
    for start, end in ((0.5, 0.2), (0.5, 0.5), (0.0, 0.0)):
        sentence = f"Image Pull is to end at {end:g} but starts at {start:g}: raise end, or lower start"
        with pytest.raises(ValueError, match=sentence):
            execute(ImagePullNode, model=parts.model, image=image, start=start, end=end)
    with pytest.raises(ValueError, match="Image Pull was given an image but no vae"):
        execute(ImagePullNode, model=parts.model, image=torch.zeros(1, 64, 64, 3))
    with pytest.raises(ValueError, match="The latent has shape .* but the MODEL takes 16 channels"):
        execute(ImagePullNode, model=parts.model, image={"samples": torch.zeros(1, 4, 8, 8)})
    other = invert(Parts(FLOWS["SD3"]).model, Guidance(parts.source), parts.image, parts.sigmas)
    with pytest.raises(ValueError, match="The trajectory was made with another model"):
        execute(ImagePullNode, model=parts.model, image=other)
