"""Fixed-point inversion: against its formula in float64, against plain DDIM inversion, through the node."""

from __future__ import annotations

import pytest
import torch
from comfy.model_base import ModelType
from comfy.model_sampling import V_PREDICTION
from torch import Tensor

from palimpsest.inversion.run import Guidance, Refinement, invert
from palimpsest.nodes.inversion import DDIMInversion
from reference import in_float64
from tiny import Tiny, execute, rows_of, tiny_model

PREDICTIONS = pytest.mark.parametrize("kind", [ModelType.EPS, ModelType.V_PREDICTION])


def refined(tiny: Tiny, iterations: int, average: int = 1) -> Tensor:
    """The inverted states, noise first."""
    refinement = Refinement(iterations, average)
    return invert(tiny.model, Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas, refinement).states


def classic(tiny: Tiny, iterations: int, average: int) -> list[Tensor]:
    """Every state in float64, in z: z_t is the DDIM step up along the mean of the last predictions."""
    unet, _ = in_float64(tiny.model)
    sampling = tiny.model.get_model_object("model_sampling")
    table, context = sampling.sigmas.double(), tiny.source[0][0].double()
    sigmas = tiny.sigmas.double().flip(0)
    alpha = 1 / (1 + sigmas**2)
    z = tiny.trajectory.states[-1].double() * alpha[0].sqrt()
    states = [z]
    for i in range(tiny.steps):
        timestep = (table - sigmas[i + 1]).abs().argmin()[None].double()
        a, b = alpha[i], alpha[i + 1]

        def noise(at: Tensor, timestep: Tensor = timestep, b: Tensor = b) -> Tensor:
            output = unet(at, timestep, context)
            return b.sqrt() * output + (1 - b).sqrt() * at if isinstance(sampling, V_PREDICTION) else output

        def up(z: Tensor, eps: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return (b / a).sqrt() * (z - (1 - a).sqrt() * eps) + (1 - b).sqrt() * eps

        predictions = [noise(z)]
        for _ in range(iterations):
            predictions.append(noise(up(z, predictions[-1])))
        z = up(z, torch.stack(predictions[-average:]).mean(0))
        states.append(z)
    return [state / at.sqrt() for state, at in zip(states, alpha, strict=True)]


@PREDICTIONS
@pytest.mark.parametrize(("iterations", "average"), [(1, 1), (3, 2), (2, 3)])
def test_it_equals_its_formula(kind: ModelType, iterations: int, average: int) -> None:
    tiny = Tiny(model=tiny_model(kind))
    ours = refined(tiny, iterations, average).flip(0)
    for mine, theirs in zip(ours, classic(tiny, iterations, average), strict=True):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()
    assert not torch.allclose(ours, tiny.trajectory.states.flip(0), rtol=1e-3)


@PREDICTIONS
def test_iterations_solve_the_implicit_equation(kind: ModelType) -> None:
    """x' - x = (sigma' - sigma) eps(x', sigma'): its residual falls at every iteration, and so does the error of the
    image that DDIM makes of the noise."""
    tiny = Tiny(steps=50, model=tiny_model(kind))
    tiny.sigmas = tiny.sigmas[25:]

    def resampled(states: Tensor, first: int, last: int) -> Tensor:
        noise = tiny.model.model.process_latent_out(states[first])
        parts = {"sigmas": tiny.sigmas[first : last + 1], "noise": noise}
        return tiny.model.model.process_latent_in(tiny.sample(tiny.model, tiny.source, cfg=1.0, **parts))

    residuals, errors = [], []
    for iterations in range(4):
        states = refined(tiny, iterations)
        x_next, x, image = states[0], states[1], states[-1]
        residuals.append(float((resampled(states, 0, 1) - x).norm() / (x_next - x).norm()))
        errors.append(float((resampled(states, 0, 25) - image).norm() / image.norm()))
    for fallen in (residuals, errors):
        assert all(later < 0.3 * earlier for earlier, later in zip(fallen, fallen[1:], strict=False)), fallen


def test_no_iterations_are_plain_inversion_bit_for_bit(tiny: Tiny) -> None:
    for average in (1, 2, 51):
        assert torch.equal(refined(tiny, 0, average), tiny.trajectory.states)


def test_each_iteration_is_one_call(tiny: Tiny) -> None:
    model, rows = rows_of(tiny.model)
    invert(model, Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas, Refinement(2, 1))
    assert rows == [1] * 3 * tiny.steps


def test_a_batch_equals_its_images() -> None:
    both = Tiny(batch=2)
    states = refined(both, 2)
    for i in range(2):
        alone = invert(both.model, Guidance(both.source, None, 1.0), both.image[i : i + 1], both.sigmas, Refinement(2))
        torch.testing.assert_close(states[:, i : i + 1], alone.states, rtol=1e-4, atol=1e-4)


def test_the_node_hands_its_settings_on(tiny: Tiny) -> None:
    parts = {"model": tiny.model, "source": tiny.source, "image": {"samples": tiny.image}, "steps": tiny.steps}
    plain, *_ = execute(DDIMInversion, **parts)
    assert torch.equal(plain.states, tiny.trajectory.states)
    found, *_ = execute(DDIMInversion, **parts, iterations=3, average=2)
    assert torch.equal(found.states, refined(tiny, 3, 2))
