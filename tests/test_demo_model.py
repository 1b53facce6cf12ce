"""The embedded demo model: its latents, its networks and what it refuses."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import avg_pool2d

from palimpsest.benchmarks import edits
from palimpsest.demo import data, train
from palimpsest.demo import model as demo_model
from palimpsest.demo.muon import Muon, orthogonal


def test_encoding_is_the_exact_inverse_of_the_linear_decoding(demo: tuple) -> None:
    autoencoder = demo[2].first_stage_model
    latent = torch.randn(2, 16, 16, 16)
    torch.testing.assert_close(autoencoder.encode(autoencoder.linear(latent)), latent, rtol=1e-4, atol=1e-4)


def test_pictures_of_the_world_survive_and_their_latents_are_centred(demo: tuple) -> None:
    vae = demo[2]
    pixels, _ = data.held_out(32)
    latent = vae.encode(pixels.movedim(1, -1) / 2 + 0.5)
    assert latent.shape == (32, 16, 16, 16)
    assert abs(latent.std() - 1) < 0.1
    assert latent.mean((0, 2, 3)).abs().max() < 0.25
    assert train.psnr(vae.decode(latent).movedim(-1, 1) * 2 - 1, pixels) > DECIBELS
    assert train.psnr(vae.first_stage_model.linear(latent), pixels) < DECIBELS  # or the decoder adds nothing


DECIBELS = 33.5


def test_previews_show_the_mean_colour_of_every_patch(demo: tuple) -> None:
    model, _, vae = demo
    latent, latent_format = torch.randn(1, 16, 16, 16), model.get_model_object("latent_format")
    factors, bias = torch.tensor(latent_format.latent_rgb_factors), torch.tensor(latent_format.latent_rgb_factors_bias)
    preview = (latent.movedim(1, -1) @ factors + bias).movedim(-1, 1)
    torch.testing.assert_close(preview, avg_pool2d(vae.first_stage_model.linear(latent), 8), rtol=1e-4, atol=1e-4)


def test_the_loaded_networks_are_the_trained_ones(demo: tuple) -> None:
    """Same weights and same shapes do not suffice: another number of attention heads would go unseen."""
    model, clip, _ = demo
    trained, shipped = train.Denoiser(), load_file(demo_model.WEIGHTS)
    trained.load_state_dict({key: shipped[key].float() for key in trained.state_dict()})
    rows = trained.text.rows([CAPTION])
    embedding = edits.encode(clip, [CAPTION])[0]
    torch.testing.assert_close(trained.text(rows), embedding, rtol=1e-4, atol=1e-4)
    latent, timestep = torch.randn(1, 16, 16, 16), torch.tensor([500])
    expected = model.model.diffusion_model(latent, timestep.float(), context=embedding)
    torch.testing.assert_close(trained(latent, timestep, rows), expected, rtol=1e-3, atol=1e-4)
    # As the host's sampler calls it: sigma in place of a timestep, and what it takes for the clean latent.
    sigma = model.get_model_object("model_sampling").sigmas[500:501]
    denoised = model.model.apply_model(latent, sigma, c_crossattn=embedding)
    noisy = latent * train.ALPHA_BAR[500].sqrt()
    torch.testing.assert_close(trained.denoised(noisy, timestep, rows), denoised, rtol=1e-3, atol=1e-3)


CAPTION = "a photo of a cat"


def test_sizes_and_latents_that_are_not_the_models_are_refused_in_a_sentence(demo: tuple) -> None:
    vae = demo[2]
    with pytest.raises(ValueError, match="takes pictures of 128 x 128 pixels, not 64 x 128: scale or crop the image"):
        vae.encode(torch.zeros(1, 128, 64, 3))
    with pytest.raises(ValueError, match="16 channels and 16 x 16, not of 4 channels and 8 x 16: connect the VAE of"):
        vae.decode(torch.zeros(1, 4, 16, 8))


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_muon_steps_are_nearly_orthogonal(shape: tuple[int, int]) -> None:
    rows, columns = (torch.linalg.qr(torch.randn(3, side, min(shape))).Q for side in shape)
    singular = torch.linalg.svdvals(orthogonal(rows * torch.linspace(0.1, 1, min(shape)) @ columns.mT))
    assert singular.min() > 0.5
    assert singular.max() < 1.3


def test_muon_steps_downhill_by_its_rate() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        weight = torch.nn.Parameter(torch.zeros(8, 2, 3, 3))
        optimizer = Muon([weight], lr=0.1, weight_decay=0.0)
        goal = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(0))
        ((weight - goal) ** 2).sum().backward()
        optimizer.step()
        assert (weight * goal).sum() > 0
        assert abs(weight.square().mean().sqrt() - 0.1 * 0.2) < 0.006
