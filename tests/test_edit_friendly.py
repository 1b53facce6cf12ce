"""Edit-friendly DDPM inversion: against its formulas in float64, exact through the host, and under the edits."""

from __future__ import annotations

import pytest
import torch
from comfy.model_base import ModelType
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from palimpsest.attention.pnp import PlugAndPlay
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.inversion.ddim import leading_sigmas
from palimpsest.inversion.edit_friendly import independent_states, posterior
from palimpsest.inversion.replay import EditFriendlySampler, invert_edit_friendly
from palimpsest.inversion.run import Guidance, record
from palimpsest.nodes.exact import EditFriendlyInversion
from test_ddim import TABLE, relative
from test_local_blend import blend
from test_source import swap
from tiny import Tiny, conditioning, execute, rows_of, tiny_model

SIGMAS = leading_sigmas(TABLE, 20).double()
WEIGHTS = torch.randn(3, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def network(z: Tensor, sigma: float) -> Tensor:
    """A small eps network in z: [b, 3, h, w]."""
    return torch.einsum("ij,bjhw->bihw", WEIGHTS, z).tanh() + 0.1 * sigma


def denoise(x: Tensor, sigma: float) -> Tensor:
    return x - sigma * network(x / (1 + sigma**2) ** 0.5, sigma)


def found_maps(image: Tensor, eta: float) -> tuple[list[Tensor], list[Tensor]]:
    """The states and the noise maps of an image in float64."""
    states = independent_states(image, SIGMAS, 0)
    maps = []
    for i, wanted in enumerate(states[1:]):
        mean, _ = posterior(states[i], float(SIGMAS[i]), float(SIGMAS[i + 1]), denoise, eta)
        maps.append(wanted - mean)
    return states, maps


IMAGE = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_maps_equal_the_formulas_and_give_the_image_back(eta: float) -> None:
    """In z: s^2 = eta^2 (1-a')/(1-a) (1-a/a'), mu = sqrt(a') z0 + sqrt(1-a'-s^2) eps; the last map is kept."""
    states, maps = found_maps(IMAGE, eta)
    alphas = 1 / (1 + SIGMAS**2)
    zs = [state * alpha.sqrt() for state, alpha in zip(states, alphas, strict=True)]
    z = zs[0]
    for i, (a, b) in enumerate(zip(alphas, alphas[1:], strict=False)):
        variance = eta**2 * (1 - b) / (1 - a) * (1 - a / b)

        def mean(z: Tensor, i: int = i, a: Tensor = a, b: Tensor = b, variance: Tensor = variance) -> Tensor:
            eps = network(z, float(SIGMAS[i]))
            z0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
            return b.sqrt() * z0 + (1 - b - variance).sqrt() * eps

        added = zs[i + 1] - mean(zs[i])
        assert (maps[i] * b.sqrt() - added).abs().max() < 1e-12
        z = mean(z) + added
    assert relative(z / alphas[-1].sqrt(), IMAGE) < 1e-12
    assert len(maps) == 20
    assert maps[-1].norm() > 0.1  # kept, however small the spread

    x = states[0]
    for i, noise in enumerate(maps):
        mean_x, _ = posterior(x, float(SIGMAS[i]), float(SIGMAS[i + 1]), denoise, eta)
        x = mean_x + noise
    assert relative(x, IMAGE) < 1e-12


def test_states_have_independent_noise() -> None:
    """Of variance one, uncorrelated between steps, the same for all images, whatever is skipped."""
    image = torch.zeros(2, 4, 32, 32)
    sigmas = SIGMAS.float()
    states = independent_states(image, sigmas, 3)
    noises = [state / sigma for state, sigma in zip(states[:-1], sigmas, strict=False)]
    table = torch.corrcoef(torch.stack([noise[0].flatten() for noise in noises]))
    assert (table - torch.eye(20)).abs().max() < 0.08
    assert all(0.95 < float(noise.std()) < 1.05 for noise in noises)
    assert all(torch.equal(*noise) for noise in noises)
    late = independent_states(image, sigmas[7:], 3)
    assert all(torch.equal(one, other) for one, other in zip(late, states[7:], strict=True))
    assert torch.equal(states[-1], image)
    assert not torch.equal(independent_states(image, sigmas, 4)[0], states[0])


def inverted(tiny: Tiny, seed: int = 0, cfg: float = 3.5, eta: float = 1.0) -> EditFriendlySampler:
    guidance = Guidance(tiny.source, tiny.negative, cfg)
    trajectory, sampler = invert_edit_friendly(tiny.model, guidance, tiny.image, tiny.sigmas[1:], eta, seed)
    tiny.follow(trajectory)
    return sampler


@pytest.mark.parametrize("kind", [ModelType.EPS, ModelType.V_PREDICTION])
@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_the_image_comes_back(kind: ModelType, eta: float) -> None:
    """To fp32 rounding, at the guidance of the inversion, where DDIM inversion fails; another prompt edits it."""
    tiny = Tiny(steps=8, batch=2, model=tiny_model(kind))
    sampler = inverted(tiny, eta=eta)
    same = tiny.sample(tiny.model, tiny.source, cfg=3.5, sampler=sampler)
    assert relative(same, tiny.image) < 1e-6
    assert torch.equal(tiny.sample(tiny.model, tiny.source, cfg=3.5, sampler=sampler), same)
    assert relative(tiny.sample(tiny.model, tiny.target, cfg=3.5, sampler=sampler), tiny.image) > 1e-2
    assert relative(tiny.sample(tiny.model, tiny.source, cfg=9.0, sampler=sampler), tiny.image) > 1e-2


def test_a_batch_equals_its_images_and_runs_repeat_bit_for_bit() -> None:
    both, again = Tiny(batch=2), Tiny(batch=2)
    sampler, repeated = inverted(both), inverted(again)
    assert torch.equal(both.trajectory.states, again.trajectory.states)
    assert all(torch.equal(one, other) for one, other in zip(sampler.maps, repeated.maps, strict=True))
    for i in range(2):
        alone = Tiny()
        alone.image = both.image[i : i + 1]
        own = inverted(alone)
        torch.testing.assert_close(both.trajectory.states[:, i : i + 1], alone.trajectory.states, rtol=1e-4, atol=1e-4)
        result = both.sample(both.model, sampler=sampler)[i : i + 1]
        assert relative(result, alone.sample(alone.model, sampler=own)) < 1e-4


INJECTION = PlugAndPlay((("output", 1),), (("output", 1), ("output", 2)), 0.8, 0.5)


@pytest.mark.parametrize("cfg", [1.0, 3.5])
def test_edits_of_nothing_keep_the_image(tiny: Tiny, cfg: float) -> None:
    """With the source's own prompt what an edit reads is the same; features are read by the negative row as well."""
    sampler = inverted(tiny, cfg=cfg)
    for edit in (swap(target=tiny.source[0][0]), INJECTION) if cfg == 1 else (swap(target=tiny.source[0][0]),):
        model, rows = rows_of(attach(tiny.model, tiny.trajectory, edit))
        assert relative(tiny.sample(model, tiny.source, cfg=cfg, sampler=sampler), tiny.image) < 1e-4
        assert rows[0] == (2 if cfg == 1 else 3)


def test_local_blend_keeps_the_source(tiny: Tiny) -> None:
    """Outside the mask the sample is the image."""
    sampler = inverted(tiny)
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    blended = tiny.sample(attach_blend(tiny.model, tiny.trajectory, blend(phrases=None, user=mask)), sampler=sampler)
    assert relative(blended[:, :, 4:], tiny.image[:, :, 4:]) < 1e-6
    assert relative(blended[:, :, :4], tiny.image[:, :, :4]) > 1e-2


def test_what_writes_into_a_run_leaves_the_inversion_alone(tiny: Tiny) -> None:
    sampler = inverted(tiny)
    before = tiny.trajectory.states.clone()

    def write(executor, x: Tensor, *args, **kwargs):
        return executor(x.add_(1), *args, **kwargs)

    model = tiny.model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test.write", write)
    tiny.sample(model, sampler=sampler)
    assert torch.equal(tiny.trajectory.states, before)


def test_a_replay_can_be_recorded(tiny: Tiny) -> None:
    sampler = inverted(tiny)
    guidance = Guidance(tiny.source, tiny.negative, 3.5)
    empty = torch.zeros_like(tiny.noise)
    recorded, result = record(tiny.model, guidance, sampler, tiny.sigmas, empty, tiny.noise, 0)
    torch.testing.assert_close(recorded.states, tiny.trajectory.states)
    assert relative(result, tiny.image) < 1e-6


def test_the_node_skips_and_refuses_in_a_sentence(tiny: Tiny) -> None:
    parts = {"model": tiny.model, "source": tiny.source, "image": {"samples": tiny.image}, "negative": tiny.negative}
    trajectory, noise, sigmas, sampler = execute(EditFriendlyInversion, **parts, steps=10)
    assert torch.equal(sigmas, leading_sigmas(tiny.model.get_model_object("model_sampling").sigmas, 10)[4:])
    assert torch.equal(trajectory.sigmas, sigmas)
    settings = {"noise": noise["samples"], "sigmas": sigmas, "cfg": 3.5}
    assert relative(tiny.sample(tiny.model, tiny.source, sampler=sampler, **settings), tiny.image) < 1e-6
    other, *_ = execute(EditFriendlyInversion, **parts, steps=10, seed=1)
    assert not torch.equal(other.states[0], trajectory.states[0])
    with pytest.raises(ValueError, match="leaves out all 10 steps at skip 1: lower skip"):
        execute(EditFriendlyInversion, **parts, steps=10, skip=1.0)
    with pytest.raises(ValueError, match="Edit Friendly Inversion at cfg 3.5 needs the negative input"):
        execute(EditFriendlyInversion, **parts | {"negative": None}, steps=10)
    with pytest.raises(ValueError, match="Edit Friendly Inversion was given a MODEL that is already edited"):
        execute(EditFriendlyInversion, **parts | {"model": attach(tiny.model, tiny.trajectory, swap())}, steps=10)
    flow, rows = rows_of(tiny_model(ModelType.FLOW))
    with pytest.raises(ValueError, match="Edit Friendly Inversion is for models that predict noise or v"):
        execute(EditFriendlyInversion, **parts | {"model": flow}, steps=10)
    assert not rows


def test_the_sampler_refuses_what_is_not_its_own(tiny: Tiny) -> None:
    sampler = inverted(tiny)

    def refused(sentence: str, model=tiny.model, **changes) -> None:
        with pytest.raises(ValueError, match=sentence):
            tiny.sample(model, sampler=sampler, **changes)

    schedule = "of Edit Friendly Inversion runs 4 steps from sigma .*: use Edit Sampler, or connect the sigmas output"
    refused(schedule, sigmas=tiny.sigmas[1:])
    refused(schedule, sigmas=tiny.sigmas * 1.01)
    latent = "starts from its own noise, but latent_image is another latent"
    refused(latent, noise=tiny.noise + 1)
    refused(latent, noise=torch.zeros_like(tiny.noise))
    refused(latent, noise=torch.zeros(1, 4, 16, 8))
    refused("carries a noise mask", noise_mask=torch.ones(1, 8, 8))
    refused("made with another model", model=tiny_model(seed=5))
    repeated = tiny.sample(tiny.model, conditioning(1), cfg=3.5, sampler=sampler, noise=tiny.noise.repeat(3, 1, 1, 1))
    assert relative(repeated, tiny.image.expand(3, -1, -1, -1)) < 1e-4
