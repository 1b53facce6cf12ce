"""Regularised inversion: losses and gradients against their formulas, what they do to noise, through the node."""

from __future__ import annotations

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from palimpsest.inversion.regularise import autocorrelation, divergence, random_shifts, regularised
from palimpsest.inversion.run import Guidance, Refinement, invert
from palimpsest.nodes.inversion import DDIMInversion
from tiny import Tiny, execute


def white(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_autocorrelation(noise: Tensor, shifts: list[tuple[int, int]]) -> Tensor:
    """[b], written out position by position."""
    losses = []
    for image in noise:
        loss = 0.0
        for channel in image:
            for i, (down, across) in enumerate(shifts):
                if i:
                    h, w = channel.shape[0] // 2, channel.shape[1] // 2
                    channel = channel[: 2 * h, : 2 * w].reshape(h, 2, w, 2).mean((1, 3))
                h, w = channel.shape
                products = [
                    [channel[y, x] * channel[(y - down) % h, x] for y in range(h) for x in range(w)],
                    [channel[y, x] * channel[y, (x - across) % w] for y in range(h) for x in range(w)],
                ]
                loss += sum((sum(p) / (h * w)) ** 2 for p in products)
        losses.append(loss)
    return torch.stack(losses)


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (17, 20), (4, 2)])
def test_losses_equal_their_formulas(size: tuple[int, int]) -> None:
    noise = white(2, 3, *size)
    shifts = random_shifts(size, generator())
    torch.testing.assert_close(autocorrelation(noise, shifts), plain_autocorrelation(noise, shifts))
    for image, found in zip(noise, divergence(noise), strict=True):
        mean = image.mean()
        variance = (image - mean).square().sum() / (image.numel() - 1)
        expected = variance + mean**2 - 1 - (variance + 1e-7).log()
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", ["autocorrelation", "divergence"])
def test_steps_follow_the_gradient(loss: str) -> None:
    """One weight alone, to first order: finite differences in float64, at every position of a small image."""
    noise = white(2, 2, 4, 6) * 1.3 + 0.2
    tiny_weight = 1e-6
    weights = (tiny_weight, 0.0) if loss == "autocorrelation" else (0.0, tiny_weight)
    stepped = (noise - regularised(noise, *weights, generator())) / tiny_weight

    shifts = generator()
    drawn = [random_shifts((4, 6), shifts) for _ in range(25)]

    def total(x: Tensor) -> Tensor:
        if loss == "autocorrelation":
            return sum(autocorrelation(x, at).sum() for at in drawn) / 5
        return 5 * divergence(x).sum()

    h = 1e-5
    expected = torch.zeros_like(noise).flatten()
    for i in range(noise.numel()):
        nudge = torch.zeros_like(expected)
        nudge[i] = h
        nudge = nudge.reshape(noise.shape)
        expected[i] = (total(noise + nudge) - total(noise - nudge)) / (2 * h)
    assert expected.norm() > 0.1
    torch.testing.assert_close(stepped, expected.reshape(noise.shape), rtol=1e-3, atol=1e-4)


def test_shifts_are_never_zero_and_always_the_same() -> None:
    source = generator()
    drawn = [random_shifts((32, 20), source) for _ in range(500)]
    downs, acrosses = zip(*(shifts[0] for shifts in drawn), strict=True)
    assert set(downs) == set(range(1, 16))
    assert set(acrosses) == set(range(1, 10))
    assert {len(shifts) for shifts in drawn} == {3}  # 32 x 20, 16 x 10, 8 x 5
    again = generator()
    assert drawn == [random_shifts((32, 20), again) for _ in range(500)]
    assert random_shifts((2, 2), generator()) == [(1, 1)]


def test_noise_becomes_more_like_white_noise() -> None:
    """Smooth noise of the wrong mean and variance: both losses fall, and it stays what it was in the main."""
    noise = white(1, 4, 32, 32)
    noise = 0.7 * noise + 0.5 * noise.roll(1, 2) + 0.4 * noise.roll(3, 3) + 0.3
    distances = [[(d, d), (d % 7 + 1, d % 7 + 1), (d % 3 + 1, d % 3 + 1)] for d in range(1, 16)]

    def losses(x: Tensor) -> tuple[float, float]:
        return float(sum(autocorrelation(x, at).sum() for at in distances)), float(divergence(x).sum())

    changed = regularised(noise, 20.0, 20.0, generator())
    assert all(after < 0.7 * before for after, before in zip(losses(changed), losses(noise), strict=True))
    assert (changed - noise).norm() < 0.1 * noise.norm()
    assert torch.equal(regularised(noise, 0.0, 0.0, generator()), noise)
    constant = torch.ones(1, 4, 8, 8, dtype=torch.float64)
    assert torch.isfinite(regularised(constant, 20.0, 20.0, generator())).all()


def test_a_batch_equals_its_images_and_runs_repeat_bit_for_bit() -> None:
    both = Tiny(batch=2)
    settings = Guidance(both.source, None, 1.0), both.image, both.sigmas, Refinement(1, 1, 20.0, 20.0)
    states = invert(both.model, *settings).states
    assert torch.equal(invert(both.model, *settings).states, states)
    assert not torch.allclose(states, both.trajectory.states, rtol=1e-3)
    for i in range(2):
        alone = invert(both.model, settings[0], both.image[i : i + 1], *settings[2:]).states
        assert (states[:, i : i + 1] - alone).norm() < 1e-4 * alone.norm()


def test_divergence_is_told_from_a_model_that_fails(tiny: Tiny) -> None:
    settings = Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas
    with pytest.raises(ValueError, match=r"diverges on this image with autocorrelation 1e\+06 and kl 0: lower"):
        invert(tiny.model, *settings, Refinement(autocorrelation=1e6))

    def failing(executor, x: Tensor, *args, **kwargs) -> Tensor:
        return executor(x, *args, **kwargs) * torch.nan

    model = tiny.model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.failing", failing)
    for weight in (0.0, 20.0):
        with pytest.raises(ValueError, match=r"NaN or infinite values: load .* \(weight_dtype\)\."):
            invert(model, *settings, Refinement(autocorrelation=weight))
    with pytest.raises(ValueError, match=r"\(weight_dtype\), or lower cfg\."):
        invert(model, Guidance(tiny.source, tiny.negative, 3.0), *settings[1:])


def test_the_node_hands_its_weights_on(tiny: Tiny) -> None:
    parts = {"model": tiny.model, "source": tiny.source, "image": {"samples": tiny.image}, "steps": tiny.steps}
    guidance = Guidance(tiny.source, None, 1.0)
    for weights in ((20.0, 0.0), (0.0, 20.0)):
        found, noise, _ = execute(DDIMInversion, **parts, autocorrelation=weights[0], kl=weights[1])
        expected = invert(tiny.model, guidance, tiny.image, tiny.sigmas, Refinement(0, 1, *weights))
        assert torch.equal(found.states, expected.states)
        assert not noise["samples"].requires_grad
