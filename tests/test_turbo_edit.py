"""TurboEdit against its loop in float64, and what the mechanics promise: the image back, and rows."""

from __future__ import annotations

import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras.nodes_model_advanced import (
    ModelSamplingContinuousEDM,
    ModelSamplingContinuousV,
    ModelSamplingDiscrete,
)
from torch import Tensor

from palimpsest.host.branch.source import attach
from palimpsest.inversion.replay import EditFriendlySampler, invert_turbo_edit
from palimpsest.inversion.turbo_edit import levels, limited
from palimpsest.nodes.exact import EditFriendlyInversion
from reference import in_float64
from test_edit_friendly import relative
from test_source import swap
from tiny import Tiny, execute, rows_of, tiny_model

W, SEED = 1.5, 3
LABELS = {4: (799, 599, 399, 199), 3: (799, 499, 199)}
each_count = pytest.mark.parametrize("steps", LABELS)


def inverted(tiny: Tiny, steps: int = 4) -> EditFriendlySampler:
    trajectory, sampler = invert_turbo_edit(tiny.model, tiny.source, tiny.image, steps, SEED)
    tiny.follow(trajectory)
    return sampler


def turbo_edit(tiny: Tiny, labels: tuple[int, ...]) -> Tensor:
    """The loop of inversion and edit in one, in z: an edit of the tiny image, in sampler space."""
    _, predict = in_float64(tiny.model)
    table = tiny.model.get_model_object("model_sampling").sigmas.double()
    alphas = 1 / (1 + table**2)
    image = tiny.model.model.process_latent_in(tiny.image).double()
    generator = torch.Generator().manual_seed(SEED)
    drawn = [torch.randn(tiny.image.shape, generator=generator).double() for _ in labels]  # from the clean end up
    states = []
    for label, noise in zip(labels, drawn[::-1], strict=True):
        a = alphas[label - 200] if label > 200 else torch.ones(()).double()
        states.append(a.sqrt() * image + (1 - a).sqrt() * noise)
    edited = states[0]
    for i, label in enumerate(labels):
        a = alphas[label]
        b = alphas[labels[i + 1]] if i + 1 < len(labels) else torch.ones(()).double()
        after = states[i + 1] if i + 1 < len(labels) else image

        def mean(z: Tensor, prompt: list, a: Tensor = a, b: Tensor = b, sigma: Tensor = table[label]) -> Tensor:
            eps = predict(z / a.sqrt(), sigma, prompt, {})
            clean = (z - (1 - a).sqrt() * eps) / a.sqrt()
            variance = (1 - b) / (1 - a) * (1 - a / b)
            return b.sqrt() * clean + (1 - b - variance).clamp(min=0).sqrt() * eps

        noise = after - mean(states[i], tiny.source)
        if i + 1 == len(labels):
            noise = noise * min(1.0, 15.5 * (noise.numel() / (4 * 64 * 64)) ** 0.5 / float(noise.norm()))
        plain, wanted = mean(edited, tiny.source), mean(edited, tiny.target)
        edited = plain + W * (wanted - plain) + noise
    return edited


@each_count
@pytest.mark.parametrize("prediction", [ModelType.EPS, ModelType.V_PREDICTION])
def test_equals_its_loop_in_float64(steps: int, prediction: ModelType) -> None:
    tiny = Tiny(model=tiny_model(prediction))
    sampler = inverted(tiny, steps)
    ours = tiny.sample(tiny.model, tiny.target, tiny.source, cfg=W, sampler=sampler)
    theirs = turbo_edit(tiny, LABELS[steps])
    plain = tiny.sample(tiny.model, tiny.source, tiny.source, cfg=W, sampler=sampler)
    assert relative(tiny.model.model.process_latent_in(ours), theirs) < 1e-5
    assert relative(plain, ours) > 1e-2


@each_count
def test_labels_on_every_table(steps: int) -> None:
    tiny = Tiny()
    (distilled,) = ModelSamplingDiscrete().patch(tiny.model, "lcm", False)
    for model in (tiny.model, distilled):
        sampling = model.get_model_object("model_sampling")
        labels, held = levels(sampling.sigmas, steps)
        assert sampling.timestep(labels[:-1]).tolist() == list(LABELS[steps])
        assert sampling.timestep(held[:-2]).tolist() == [label - 200 for label in LABELS[steps][:-1]]
        assert held[-2:].tolist() == [0, 0]
        assert labels[-1] == 0


@each_count
def test_the_image_comes_back_but_for_what_the_last_map_is_held_to(steps: int) -> None:
    tiny = Tiny(batch=2)
    sampler = inverted(tiny, steps)
    back = tiny.sample(tiny.model, tiny.source, tiny.source, cfg=W, sampler=sampler)
    lost = tiny.model.model.process_latent_in(tiny.image) - tiny.model.model.process_latent_in(back)
    before, after = tiny.trajectory.states[-2:]
    assert relative(tiny.trajectory.states[-1], tiny.model.model.process_latent_in(tiny.image)) < 1e-6
    last = sampler.maps[-1]
    assert last.square().mean((1, 2, 3)).sqrt() == pytest.approx([15.5 / 128] * 2, rel=1e-5)
    assert relative(before, after) > 1e-2
    # Along the map: what is lost is a multiple of it.
    for one, other in zip(lost.flatten(1), last.flatten(1), strict=True):
        assert torch.cosine_similarity(one, other, dim=0) > 1 - 1e-5


def test_the_last_map_is_held_image_by_image() -> None:
    maps = torch.stack([torch.full((4, 8, 8), 0.01), torch.full((4, 8, 8), 3.0), torch.zeros(4, 8, 8)])
    small, large, none = limited(maps)
    assert torch.equal(small, maps[0])
    assert large.square().mean().sqrt() == pytest.approx(15.5 / 128)
    assert torch.equal(none, maps[2])


@each_count
def test_rows(steps: int) -> None:
    """One a step, and two for the edit; one call more each way makes sure that the model repeats its answers."""
    tiny = Tiny()
    plain = tiny.model
    tiny.model, rows = rows_of(plain)
    sampler = inverted(tiny, steps)
    assert rows == [1] * (steps + 1)
    rows.clear()
    tiny.sample(tiny.model, tiny.target, tiny.source, cfg=W, sampler=sampler)
    assert rows == [2] * (steps + 1)
    rows.clear()
    tiny.sample(attach(tiny.model, tiny.trajectory, swap()), tiny.target, tiny.source, cfg=W, sampler=sampler)
    assert rows[0] == 3


def test_the_node(tiny: Tiny) -> None:
    parts = {"model": tiny.model, "source": tiny.source, "image": {"samples": tiny.image}, "seed": SEED}
    trajectory, noise, sigmas, sampler = execute(EditFriendlyInversion, **parts, preset="TurboEdit, 4 steps")
    ours = inverted(tiny)
    assert torch.equal(trajectory.states, tiny.trajectory.states)
    assert torch.equal(sigmas, tiny.sigmas)
    edit, wanted = (tiny.sample(tiny.model, tiny.target, tiny.source, cfg=W, sampler=s) for s in (sampler, ours))
    assert torch.equal(edit, wanted)
    assert torch.equal(noise["samples"], tiny.noise)
    for continuous in (
        ModelSamplingContinuousEDM().patch(tiny.model, "eps", 14.6, 0.03),
        ModelSamplingContinuousV().patch(tiny.model, "v_prediction", 14.6, 0.03),
    ):
        with pytest.raises(
            ValueError, match="TurboEdit tells the model timesteps .* has none of: remove ModelSampling"
        ):
            execute(EditFriendlyInversion, **parts | {"model": continuous[0]}, preset="TurboEdit, 4 steps")
    with pytest.raises(ValueError, match="Edit Friendly Inversion is for models that predict noise or v"):
        execute(EditFriendlyInversion, **parts | {"model": tiny_model(ModelType.FLOW)}, preset="TurboEdit, 3 steps")
