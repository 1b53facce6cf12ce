"""DDIM inversion against diffusers' inverse scheduler and against the sampler that it inverts."""

from __future__ import annotations

import pytest
import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy.model_base import ModelType
from diffusers import DDIMInverseScheduler, DDIMScheduler

from palimpsest.inversion.ddim import first_noise, leading_sigmas, step_up
from palimpsest.inversion.run import Guidance, invert
from tiny import Tiny, conditioning, tiny_model

SD = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
ALPHA_BAR = DDIMScheduler(**SD).alphas_cumprod.double()
TABLE = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("steps", [1, 2, 15, 50, 333])
def test_leading_schedule_is_diffusers(steps: int) -> None:
    scheduler = DDIMScheduler(**SD)
    scheduler.set_timesteps(steps)
    expected = torch.cat((TABLE[scheduler.timesteps], TABLE[:1]))
    torch.testing.assert_close(leading_sigmas(TABLE, steps).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps", [0, -3, 1000])
def test_unfit_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"{steps} steps do not fit"):
        leading_sigmas(TABLE, steps)


@pytest.mark.parametrize("kind", [ModelType.EPS, ModelType.V_PREDICTION])
def test_inversion_equals_diffusers_inverse_scheduler(kind: ModelType) -> None:
    """50 steps of the same network: every state within 1e-4 of diffusers', whose z is x / sqrt(1 + sigma^2).

    It is given the noise that a v names at the timestep it was asked for; of a v itself it would take the noise at the
    timestep before.
    """
    model, source = tiny_model(kind), conditioning(1)
    image = torch.randn(1, 4, 8, 8) * 5
    sigmas = leading_sigmas(model.get_model_object("model_sampling").sigmas, 50)
    trajectory = invert(model, Guidance(source, None, 1.0), image, sigmas)

    scheduler = DDIMInverseScheduler(**SD)
    scheduler.set_timesteps(50)
    z = trajectory.states[-1] / (1 + sigmas[-1] ** 2).sqrt()
    for i, timestep in enumerate(scheduler.timesteps):
        output = model.model.diffusion_model(z, timestep[None].float(), context=source[0][0])
        if kind is ModelType.V_PREDICTION:
            alpha_bar = ALPHA_BAR[timestep]
            output = alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * z
        z = scheduler.step(output, timestep, z).prev_sample
        sigma = sigmas[-2 - i]
        assert relative(trajectory.states[-2 - i] / (1 + sigma**2).sqrt(), z) < 1e-4


def test_sampling_equals_diffusers_ddim() -> None:
    """The schedule handed out with a trajectory makes the host's euler sampler diffusers' DDIM."""
    tiny = Tiny(steps=50)
    x = tiny.sample(tiny.model, cfg=1.0)
    scheduler = DDIMScheduler(**SD)
    scheduler.set_timesteps(50)
    z = tiny.trajectory.states[0] / (1 + tiny.sigmas[0] ** 2).sqrt()
    for timestep in scheduler.timesteps:
        output = tiny.model.model.diffusion_model(z, timestep[None].float(), context=tiny.target[0][0])
        z = scheduler.step(output, timestep, z).prev_sample
    assert relative(tiny.model.model.process_latent_in(x) / (1 + tiny.sigmas[-1] ** 2).sqrt(), z) < 1e-4


def test_inversion_is_exact_for_a_constant_noise_estimate() -> None:
    """Where the network's answer does not depend on its input, inversion and sampling undo each other."""
    eps = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    sigmas = leading_sigmas(TABLE, 20).double()
    start = torch.randn_like(eps)
    x = start
    for sigma, sigma_next in zip(reversed(sigmas.tolist()), reversed(sigmas.tolist()[:-1]), strict=False):
        noise = first_noise(x, sigma, sigma_next, lambda seen, level: seen - level * eps)
        x, denoised = step_up(x, sigma, sigma_next, noise)
        torch.testing.assert_close(denoised, start - sigmas[-1] * eps)
    back = sample_euler(lambda seen, level: seen - level * eps, x, sigmas, disable=True)
    torch.testing.assert_close(back, start)


def test_batches_are_inverted_image_by_image() -> None:
    tiny = Tiny(batch=3)
    alone = invert(tiny.model, Guidance(tiny.source, None, 1.0), tiny.image[1:2], tiny.sigmas)
    torch.testing.assert_close(tiny.trajectory.states[:, 1:2], alone.states, rtol=1e-4, atol=1e-4)


def test_the_clean_end_is_the_image_exactly() -> None:
    tiny = Tiny()
    assert torch.equal(tiny.trajectory.states[-1], tiny.model.model.process_latent_in(tiny.image))


def test_guidance_changes_the_path_and_needs_a_negative(tiny: Tiny) -> None:
    guided = invert(tiny.model, Guidance(tiny.source, tiny.negative, 3.0), tiny.image, tiny.sigmas)
    assert relative(guided.states[0], tiny.trajectory.states[0]) > 1e-3
    with pytest.raises(ValueError, match="cfg 3 needs the negative input"):
        invert(tiny.model, Guidance(tiny.source, None, 3.0), tiny.image, tiny.sigmas)
