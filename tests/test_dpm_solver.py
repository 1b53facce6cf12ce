"""Second-order inversion for dpmpp_2m: against its formula, diffusers' inverse scheduler and the host's sampler."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import comfy.samplers
import numpy as np
import pytest
import torch
from comfy.k_diffusion.sampling import sample_dpmpp_2m
from comfy.model_base import ModelType
from diffusers import DPMSolverMultistepInverseScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from palimpsest.benchmarks.edits import encode
from palimpsest.demo import scenes
from palimpsest.host.branch.source import attach
from palimpsest.host.files.trajectory import DPMPP_2M, EULER, Trajectory
from palimpsest.inversion.ddim import leading_sigmas
from palimpsest.inversion.dpm_solver import Evaluation, multistep
from palimpsest.inversion.null_text import Settings, null_text
from palimpsest.inversion.run import PLAIN, UNI_INV, Guidance, invert, resample
from palimpsest.nodes.inversion import DDIMInversion
from palimpsest.nodes.sampler import EditSampler
from test_ddim import SD, TABLE, relative
from test_edit_friendly import IMAGE, network
from test_edit_sampler import by_hand, guidance_of
from test_source import swap
from tiny import Tiny, conditioning, execute, rows_of, run, tiny_model


def denoise(x: Tensor, sigma: float) -> Tensor:
    return x - sigma * network(x / (1 + sigma**2) ** 0.5, sigma)


def walked(x: Tensor, sigmas: list[float]) -> Tensor:
    before = None
    for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
        now = Evaluation(sigma, denoise(x, sigma))
        x, before = multistep(x, now, sigma_next, before), now
    return x


def test_steps_equal_the_formula() -> None:
    """Algorithm 2 with alpha and sigma of z, of which lambda is log(alpha / sigma)."""
    levels = leading_sigmas(TABLE, 12).double().flip(0)
    alphas, sigmas = (1 + levels**2).rsqrt(), levels * (1 + levels**2).rsqrt()
    lambdas = (alphas / sigmas).log()
    z, answers = IMAGE * alphas[0], []
    for i, level in enumerate(levels[:-1].tolist()):
        answers.append(denoise(z / alphas[i], level))
        h, d = lambdas[i + 1] - lambdas[i], answers[i]
        if i > 0:
            r = (lambdas[i] - lambdas[i - 1]) / h
            d = (1 + 1 / (2 * r)) * answers[i] - 1 / (2 * r) * answers[i - 1]
        z = sigmas[i + 1] / sigmas[i] * z - alphas[i + 1] * torch.expm1(-h) * d
    assert relative(walked(IMAGE, levels.tolist()) * alphas[-1], z) < 1e-12


@pytest.mark.parametrize("rising", [False, True])
def test_steps_are_the_hosts_both_ways(rising: bool) -> None:
    sigmas = leading_sigmas(TABLE, 12).double()
    sigmas = sigmas.flip(0) if rising else sigmas
    host = sample_dpmpp_2m(lambda x, sigma: denoise(x, float(sigma[0])), IMAGE, sigmas, disable=True)
    assert relative(walked(IMAGE, sigmas.tolist()), host) < 1e-12


def test_the_inverse_is_of_second_order() -> None:
    """Twice the steps take the way up and down to less than a third of the error; of first order it is a half."""
    errors = []
    for steps in (20, 40, 80):
        sigmas = torch.linspace(-3, 2.5, steps + 1, dtype=torch.float64).exp().tolist()
        errors.append(relative(walked(walked(IMAGE, sigmas), sigmas[::-1]), IMAGE))
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3


@pytest.mark.parametrize(("prediction", "kind"), [("epsilon", ModelType.EPS), ("v_prediction", ModelType.V_PREDICTION)])
def test_inversion_equals_diffusers_inverse_scheduler(prediction: str, kind: ModelType) -> None:
    """20 steps of the same network, every state; without its last step of lower order, where few steps are run."""
    schedule = {key: SD[key] for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")}
    scheduler = DPMSolverMultistepInverseScheduler(**schedule, prediction_type=prediction, lower_order_final=False)
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas.flip(0)
    model, source = tiny_model(kind), conditioning(1)
    image = torch.randn(1, 4, 8, 8) * 5
    trajectory = invert(model, Guidance(source, None, 1.0), image, sigmas, solver=DPMPP_2M)

    z = trajectory.states[-1] / (1 + sigmas[-1] ** 2).sqrt()
    for i, timestep in enumerate(scheduler.timesteps):
        output = model.model.diffusion_model(z, timestep[None].float(), context=source[0][0])
        z = scheduler.step(output, timestep, z).prev_sample
        assert relative(trajectory.states[-2 - i] / (1 + sigmas[-2 - i] ** 2).sqrt(), z) < 1e-4


def inverted(tiny: Tiny) -> Tiny:
    """The same with a trajectory for dpmpp_2m."""
    guidance = Guidance(tiny.source, None, 1.0)
    tiny.follow(invert(tiny.model, guidance, tiny.image, tiny.sigmas, solver=DPMPP_2M))
    return tiny


@pytest.mark.parametrize("schedule", comfy.samplers.SCHEDULER_NAMES)
def test_any_schedule_at_one_evaluation_a_step(tiny: Tiny, schedule: str) -> None:
    """Also those that end at sigma 0, which has no logarithm: the first step up is DDIM inversion's there."""
    sigmas = comfy.samplers.calculate_sigmas(tiny.model.get_model_object("model_sampling"), schedule, 8).cpu()
    model, rows = rows_of(tiny.model)
    plain, second = (
        invert(model, Guidance(tiny.source, None, 1.0), tiny.image, sigmas, solver=solver)
        for solver in (EULER, DPMPP_2M)
    )
    assert rows == [1] * 2 * plain.steps
    assert torch.isfinite(second.states).all()
    assert torch.equal(second.states[-1], plain.states[-1])
    assert torch.equal(second.states[-2], plain.states[-2]) == (sigmas[-1] == 0)
    assert not torch.equal(second.states[0], plain.states[0])


@pytest.mark.parametrize("schedule", ["leading", "karras"])
def test_it_reconstructs_better_than_ddim(demo: tuple, schedule: str) -> None:
    """Two demo scenes at 20 steps: less than half of the error, each with its own sampler, which is the default; and so
    does Uni-Inv with euler.
    """
    model, clip, vae = demo
    rng = random.Random(2026)
    drawn = [scenes.sample(rng) for _ in range(2)]
    image = vae.encode(torch.from_numpy(np.stack([scenes.render(scene) for scene in drawn])))
    guidance = Guidance([encode(clip, [scene.caption for scene in drawn])], None, 1.0)
    model_sampling = model.get_model_object("model_sampling")
    if schedule == "leading":
        sigmas = leading_sigmas(model_sampling.sigmas, 20)
    else:
        sigmas = comfy.samplers.calculate_sigmas(model_sampling, schedule, 20).cpu()
    errors = {}
    for solver in (EULER, DPMPP_2M, UNI_INV):
        trajectory = invert(model, guidance, image, sigmas, solver=solver)
        errors[solver] = relative(resample(model, trajectory, guidance), image)
    assert max(errors[DPMPP_2M], errors[UNI_INV]) < errors[EULER] / 2
    assert errors[DPMPP_2M] < 0.05


def test_edit_sampler_takes_the_sampler_of_the_trajectory(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    """A mismatch is less exact, not wrong: it is said in the log and under the node."""
    own = comfy.samplers.sampler_object(DPMPP_2M)
    plain = tiny.trajectory
    model = attach(tiny.model, inverted(tiny).trajectory, swap())
    guidance = guidance_of(tiny)
    with caplog.at_level(logging.WARNING):
        ours = resample(model, tiny.trajectory, guidance)
        assert torch.equal(ours, by_hand(model, tiny.trajectory, guidance, own))
        by_any = attach(tiny.model, plain, swap())
        assert not torch.equal(ours, resample(by_any, plain, guidance, own))
        assert "inverted for" not in caplog.text
        resample(model, tiny.trajectory, guidance, comfy.samplers.sampler_object("euler"))
    assert "inverted for dpmpp_2m, but is sampled with euler, which gives the image back less exactly" in caplog.text


def test_the_nodes(demo: tuple) -> None:
    model, clip, vae = demo
    source = clip.encode_from_tokens_scheduled(clip.tokenize("a photo of a cat on a meadow"))
    image = torch.from_numpy(scenes.render(scenes.parse("a photo of a cat on a meadow", 3)))[None]
    inputs = {"model": model, "source": source, "image": image, "vae": vae, "steps": 4}
    said = run(DDIMInversion, **inputs, solver="dpmpp_2m")
    trajectory = said.result[0]
    assert said.ui.as_dict()["text"][0].endswith(" MB. Sampler: dpmpp_2m.")
    assert said.ui.as_dict()["text"][0].startswith("4 network evaluations, 4 rows, ")
    assert trajectory.sampler == DPMPP_2M
    usual = run(DDIMInversion, **inputs)
    assert usual.result[0].sampler == EULER
    assert usual.ui.as_dict()["text"][0].endswith(" MB.")

    def told(**sampler) -> str:
        edit = {"model": model, "trajectory": trajectory, "positive": source, "vae": vae, "cfg": 1.0}
        return run(EditSampler, **edit, **sampler).ui.as_dict()["text"][0]

    assert "inverted for" not in told()
    assert "inverted for" not in told(sampler=comfy.samplers.sampler_object("dpmpp_2m"))
    assert told(sampler=comfy.samplers.sampler_object("heun")).endswith("less exactly: choose dpmpp_2m.")


def test_the_default_is_ddim_inversion(tiny: Tiny) -> None:
    parts = {"model": tiny.model, "source": tiny.source, "image": {"samples": tiny.image}, "steps": tiny.steps}
    trajectory, *_ = execute(DDIMInversion, **parts)
    assert torch.equal(trajectory.states, tiny.trajectory.states)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"iterations": 2}, "iterations 2 refines the steps of ddim, but its solver is dpmpp_2m: set iterations to 0"),
        ({"average": 2}, "average 2 refines .* its solver is dpmpp_2m: set average to 1, or solver to ddim"),
        ({"autocorrelation": 20.0}, "autocorrelation 20 refines .* set autocorrelation to 0, or solver to ddim"),
        ({"kl": 20.0}, "kl 20 refines .* set kl to 0, or solver to ddim .euler."),
    ],
)
def test_refinements_of_euler_are_refused(tiny: Tiny, changed: dict, sentence: str) -> None:
    refinement = PLAIN._replace(**changed)
    guidance = Guidance(tiny.source, None, 1.0)
    with pytest.raises(ValueError, match=sentence):
        invert(tiny.model, guidance, tiny.image, tiny.sigmas, refinement, DPMPP_2M)


def test_null_text_is_refused(tiny: Tiny) -> None:
    pivot = inverted(tiny).trajectory
    with pytest.raises(
        ValueError, match="to the steps of euler, but the trajectory was inverted for dpmpp_2m: set sol"
    ):
        null_text(tiny.model, pivot, tiny.negative, Settings(4.0, inner_steps=2), True)


def test_files_remember_it_and_older_ones_load(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    inverted(tiny).trajectory.save(path)
    assert Trajectory.load(path).sampler == DPMPP_2M
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, {name: value for name, value in metadata.items() if name != "sampler"})
    assert Trajectory.load(path).sampler == EULER
    save_file(tensors, path, metadata | {"sampler": "heun"})
    with pytest.raises(ValueError, match="'x.safetensors' is a damaged trajectory: its sampler 'heun' is unknown"):
        Trajectory.load(path)
