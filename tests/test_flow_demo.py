"""The embedded flow model: its training forward, its loader, and what the host's own nodes draw with it."""

from __future__ import annotations

import comfy.ops
import pytest
import torch
from comfy.ldm.flux.model import Flux

from palimpsest.demo import flow, train_flow


@pytest.fixture
def random_velocity() -> train_flow.Velocity:
    velocity = train_flow.Velocity()
    generator = torch.Generator().manual_seed(0)
    for parameter in velocity.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter.shape) ** 0.5)
    return velocity


def test_the_training_forward_is_the_hosts(random_velocity: train_flow.Velocity) -> None:
    host = Flux(**flow.FLUX, operations=comfy.ops.disable_weight_init)
    host.load_state_dict(random_velocity.state_dict())
    noisy, text, pooled = torch.randn(3, 16, 16, 16), torch.randn(3, flow.TEXT_TOKENS, 128), torch.randn(3, 128)
    time = torch.tensor([0.01, 0.5, 1.0])
    expected = host(noisy, time, text, pooled)
    assert expected.std() > 0.1
    torch.testing.assert_close(random_velocity(noisy, time, text, pooled), expected, rtol=1e-5, atol=1e-5)


def test_gelu_and_its_slope() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
        expected = torch.nn.functional.gelu(x, approximate="tanh")
        torch.testing.assert_close(train_flow.Gelu.apply(x), expected)
        slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (train_flow.Gelu.apply(x), expected)]
        torch.testing.assert_close(*slopes)
