"""Inversion of flow models: Uni-Inv against its loop in float64, where a run starts, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import comfy.sample
import comfy.samplers
import pytest
import torch
from torch import Tensor

from flows import FLOWS, Flow
from palimpsest.host.files.trajectory import DPMPP_2M, Trajectory
from palimpsest.host.run.model import noise_latent
from palimpsest.inversion.run import UNI_INV, Guidance, Refinement, ddim_sigmas, invert, record, resample
from palimpsest.nodes.exact import EDICTInversion, EditFriendlyInversion, OBELMInversion
from palimpsest.nodes.inversion import DDIMInversion, RecordTrajectory
from palimpsest.nodes.null_text import NullTextInversion
from reference import in_float64
from test_flow_edit import CFG, SEED, STEPS, Denoise, Parts, close, every_flow
from tiny import Tiny, execute, run


def inverted(parts: Parts, iterations: int = 0) -> Trajectory:
    return invert(parts.model, Guidance(parts.source), parts.image, parts.sigmas, Refinement(iterations))


@every_flow
@pytest.mark.parametrize("iterations", [0, 2])
def test_equals_uni_inv(flow: Flow, iterations: int) -> None:
    parts = Parts(flow)
    trajectory = inverted(parts, iterations)

    def body(denoise: Denoise, image: Tensor) -> Tensor:
        def velocity(x: Tensor, sigma: float) -> Tensor:
            return (x - denoise("source", x, sigma)) / sigma

        levels = parts.sigmas.double().flip(0).tolist()
        x, v = image, velocity(image, levels[1])
        for sigma, above in zip(levels, levels[1:], strict=False):
            for _ in range(1 + iterations):
                v = velocity(x + (above - sigma) * v, above)
            x = x + (above - sigma) * v
        return x

    assert trajectory.states.shape == (STEPS + 1, *flow.latent)
    # The host scales what a sampler returns by what is left of the image, which at sigma 1 is nothing.
    walked = []
    parts.loop(lambda denoise, image: walked.append(body(denoise, image)) or image)
    assert close(trajectory.states[0], walked[0].float(), 1e-4)
    assert torch.equal(trajectory.states[-1], parts.model.model.process_latent_in(parts.image))


@pytest.mark.parametrize("name", ["Flux", "SD3", "Wan"])
def test_returns_the_better_the_more_iterations(name: str) -> None:
    """Along the same sigmas by euler: the fixed point is the step's exact inverse, where steps are small enough."""
    parts = Parts(FLOWS[name])
    parts.sigmas = ddim_sigmas(parts.model, 20)
    errors = []
    for iterations in (0, 1, 4):
        back = resample(parts.model, inverted(parts, iterations), Guidance(parts.source))
        errors.append(float((back - parts.image).norm() / parts.image.norm()))
    print(errors)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 3


@every_flow
def test_a_run_starts_at_the_trajectorys_own_state(flow: Flow) -> None:
    """Also where a stock sampler would start at 0, whatever is connected; from the middle, as it is."""
    parts = Parts(flow)
    model = parts.model
    trajectory = inverted(parts)

    def body(denoise: Denoise, image: Tensor) -> Tensor:
        x = trajectory.states[0].double()
        for sigma, below in zip(parts.sigmas.tolist(), parts.sigmas.tolist()[1:], strict=False):
            positive, negative = denoise("positive", x, sigma), denoise("negative", x, sigma)
            x = x + (below - sigma) * (x - negative - CFG * (positive - negative)) / sigma
        return x

    plain = parts.loop(body)
    guidance = Guidance(parts.target, parts.negative, CFG)
    assert close(resample(model, trajectory, guidance), plain)
    recorded, result = record(
        model,
        guidance,
        comfy.samplers.sampler_object("euler"),
        parts.sigmas,
        comfy.sample.prepare_noise(parts.image, SEED),
        torch.zeros_like(parts.image),
        SEED,
    )
    assert torch.equal(resample(model, recorded, guidance), result)


def test_schedules() -> None:
    """The papers' schedule is a UNet's; here it is the host's simple one, from 1 to 0."""
    parts = Parts(FLOWS["SD3"])
    inputs = {"model": parts.model, "source": parts.source, "image": {"samples": parts.image}, "steps": 4}
    trajectory, _, sigmas = execute(DDIMInversion, **inputs)
    sampling = parts.model.get_model_object("model_sampling")
    assert torch.equal(sigmas, comfy.samplers.calculate_sigmas(sampling, "simple", 4))
    assert torch.equal(trajectory.sigmas, sigmas)
    _, _, other = execute(DDIMInversion, **inputs, schedule="beta")
    assert torch.equal(other, comfy.samplers.calculate_sigmas(sampling, "beta", 4))


def test_the_noise_latent_of_a_part_of_the_schedule() -> None:
    """Below sigma 1 a sampler without added noise begins where the trajectory does."""
    parts = Parts(FLOWS["Flux"])
    sigmas = parts.sigmas[2:]
    trajectory = invert(parts.model, Guidance(parts.source), parts.image, sigmas)
    guidance = Guidance(parts.target, parts.negative, CFG)
    from_noise = comfy.sample.sample_custom(
        parts.model,
        torch.zeros_like(parts.image),
        CFG,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        parts.target,
        parts.negative,
        noise_latent(parts.model, trajectory),
        disable_pbar=True,
        seed=0,
    )
    assert close(from_noise, resample(parts.model, trajectory, guidance), 1e-5)


@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    parts = Parts(FLOWS[name])
    trajectory = inverted(parts)
    trajectory.save(tmp_path / "it.safetensors")
    loaded = Trajectory.load(tmp_path / "it.safetensors")
    assert torch.equal(loaded.states, trajectory.states)
    guidance = Guidance(parts.target, parts.negative, CFG)
    assert torch.equal(*(resample(parts.model, one, guidance) for one in (trajectory, loaded)))


def test_a_picture_for_a_model_of_videos() -> None:
    """The host gives it a time of 1."""
    parts = Parts(FLOWS["Qwen-Image"])
    flat = invert(parts.model, Guidance(parts.source), parts.image[:, :, 0], parts.sigmas)
    assert torch.equal(flat.states, inverted(parts).states)


@pytest.mark.parametrize(("name", "warned"), [("Flux", True), ("Flux dev", False), ("Chroma", False), ("SD3", False)])
def test_a_warning_of_models_distilled_to_few_steps(name: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Under the node and in the log, of the configuration that schnell has; the inversion is as ever."""
    parts = Parts(FLOWS[name])
    inputs = {"model": parts.model, "source": parts.source, "image": {"samples": parts.image}, "steps": STEPS}
    output = run(DDIMInversion, **inputs)
    sentence = "This MODEL is of FLUX.1 schnell's kind: where its checkpoint is distilled to a few steps"
    (told,) = output.ui.as_dict()["text"]
    assert (sentence in told) == (sentence in caplog.text) == warned
    assert told.endswith("edit it by Flow Edit instead." if warned else "MB.")
    assert torch.equal(output.result[0].states, inverted(parts).states)


@every_flow
def test_embeddings_of_another_width_are_refused(flow: Flow) -> None:
    """A prompt of another model's CLIP, before anything runs."""
    parts = Parts(flow)
    inputs = {"model": parts.model, "image": {"samples": parts.image}, "steps": STEPS, "cfg": 2.0}
    [[embedding, values]] = parts.negative
    other = [[embedding[..., :-1], values]]
    kind = type(parts.model.model).__name__
    for prompts, name in (((other, parts.negative), "source"), ((parts.source, other), "negative")):
        with pytest.raises(
            ValueError,
            match=rf"The {name} prompt of DDIM Inversion has embeddings of 31 channels but this MODEL \({kind}\) takes "
            "32: connect the CLIP that belongs to the MODEL to Prompt Edit or CLIP Text Encode",
        ):
            execute(DDIMInversion, **inputs, source=prompts[0], negative=prompts[1])


def test_embeddings_of_another_width_are_refused_on_unets(tiny: Tiny) -> None:
    other = [[tiny.source[0][0][..., 1:], {}]]
    for node in (DDIMInversion, EDICTInversion):
        name = node.GET_SCHEMA().display_name
        with pytest.raises(ValueError, match=rf"source prompt of {name} has embeddings of 63 channels but .* takes 64"):
            execute(node, model=tiny.model, source=other, image={"samples": tiny.image}, cfg=1.0)


@pytest.mark.parametrize("node", [EDICTInversion, EditFriendlyInversion, OBELMInversion])
def test_inversions_of_noise_alone_are_refused(node: type) -> None:
    parts = Parts(FLOWS["Flux"])
    name = node.GET_SCHEMA().display_name
    with pytest.raises(ValueError, match=rf"{name} is for models that predict noise or v, .* this MODEL \(Flux\)"):
        execute(node, model=parts.model, source=parts.source, image={"samples": parts.image})


def test_null_text_is_refused() -> None:
    parts = Parts(FLOWS["Flux"])
    with pytest.raises(ValueError, match=r"This MODEL \(Flux\) is no UNet"):
        execute(NullTextInversion, model=parts.model, trajectory=inverted(parts), empty=parts.negative)


def test_settings_of_noise_alone_are_refused() -> None:
    parts = Parts(FLOWS["Flux"])

    def invert_with(refinement: Refinement, solver: str = "euler") -> None:
        invert(parts.model, Guidance(parts.source), parts.image, parts.sigmas, refinement, solver)

    with pytest.raises(ValueError, match="DDIM Inversion's kl 20 refines the steps of ddim, but its solver is uni-inv"):
        invert_with(Refinement(kl=20))
    with pytest.raises(ValueError, match="DDIM Inversion's average 2 .* set average to 1"):
        invert_with(Refinement(average=2))
    with pytest.raises(ValueError, match=r"solver dpmpp_2m .* MODEL \(Flux\) predicts a flow: set solver to uni-inv"):
        invert_with(Refinement(), DPMPP_2M)


def test_uni_inv_on_a_unet() -> None:
    """Its loop in the sampler's space, where DDIM's step is Euler's."""
    tiny = Tiny()
    denoise = estimates(tiny)
    ours = invert(tiny.model, Guidance(tiny.source), tiny.image, tiny.sigmas, solver=UNI_INV)
    levels = tiny.sigmas.double().flip(0).tolist()
    x = tiny.trajectory.states[-1].double()
    v = (x - denoise(x, levels[1])) / levels[1]
    for sigma, above in zip(levels, levels[1:], strict=False):
        guess = x + (above - sigma) * v
        v = (guess - denoise(guess, above)) / above
        x = x + (above - sigma) * v
    assert close(ours.states[0], x.float(), 1e-4)
    assert ours.sampler == "euler"


def estimates(tiny: Tiny) -> Callable[[Tensor, float], Tensor]:
    """The source's denoised estimate in float64."""
    _, eps = in_float64(tiny.model)
    return lambda x, sigma: x - sigma * eps(x, torch.tensor(sigma).double(), tiny.source, {})


def test_recording_without_noise_where_the_latent_counts_for_nothing() -> None:
    parts = Parts(FLOWS["Flux"])
    inputs = {"model": parts.model, "positive": parts.source, "negative": parts.negative, "cfg": CFG}
    inputs |= {"sampler": comfy.samplers.sampler_object("euler"), "latent_image": {"samples": parts.image}}
    with pytest.raises(ValueError, match="At sigma 1 a model that predicts a flow sees nothing of latent_image"):
        execute(RecordTrajectory, **inputs, add_noise=False, sigmas=parts.sigmas)
    trajectory, *_ = execute(RecordTrajectory, **inputs, add_noise=False, sigmas=parts.sigmas[2:])
    assert torch.equal(trajectory.sigmas, parts.sigmas[2:])
