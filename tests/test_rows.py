"""Rows that would do nothing are not run: negatives at cfg 1, sources that nothing reads from, images one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider, sampler_object
from comfy_extras.nodes_custom_sampler import BasicGuider, CFGOverride, DualModelGuider
from comfy_extras.nodes_perpneg import PerpNegGuider
from torch import Tensor

from palimpsest.attention.local_blend import LocalBlend
from palimpsest.guidance.cross_attention import CrossAttentionGuidance
from palimpsest.guidance.proximal import INVERSION, Proximal
from palimpsest.host.branch.guide import attach_guide
from palimpsest.host.branch.guided import attach_rule
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.host.run.model import noise_latent
from palimpsest.inversion.replay import invert_edict, invert_edit_friendly
from palimpsest.inversion.run import Guidance, Refinement, invert, record, resample
from palimpsest.inversion.virtual import PRESETS
from test_composition import edit, stored
from test_shortcuts import FORMS
from test_virtual import sampler_of, virtual
from tiny import Tiny, conditioning, rows_of

CFG, STEPS = 4.0, 5
LATE = 2  # the step from which on the negative is saved, where it is not from the first
EULER = sampler_object("euler")

each_kind = pytest.mark.parametrize("kind", ["swap", "refine", "pnp", "masactrl"])


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    with torch.inference_mode():
        return Tiny(STEPS)


# --- cfg 1 -----------------------------------------------------------------------------------------------------------


def override(model: ModelPatcher, sigma: Tensor | None = None) -> ModelPatcher:
    """CFG Override to 1, from the step at `sigma` on where one is given."""
    start = 0.0 if sigma is None else 1 - float(model.get_model_object("model_sampling").timestep(sigma) + 1) / 999
    return CFGOverride.execute(model, 1.0, start, 1.0).result[0]


def in_both_orders(
    node: Callable[[ModelPatcher], ModelPatcher], model: ModelPatcher, sigma: Tensor | None = None
) -> list[ModelPatcher]:
    return [node(override(model, sigma)), override(node(model), sigma)]


ALONE = {  # the rows of every step at cfg 1
    "none": [1],
    "swap": [2],
    "refine": [2],
    "pnp": [2],
    "masactrl": [2],
    "store": [1],
    "two targets": [1, 2],
    "controlnet": [1, 1],
    "blend": [2],
    "blend, store": [1],
    "blend, two targets": [1, 2],
    "guidance": [1, 1, 1],
    "guidance, blend": [1, 1, 2],
    "source as negative": [2],
    "negative coming in": [2],
    "proximal": [2],
}
ENDING = {  # those of a step with the source and of one without
    "ending": ([2], [1]),
    "ending, two targets": ([1, 2], [2]),
    "ending, controlnet": ([1, 1], [1]),
}
AT_CFG_1 = {form: rows * STEPS for form, rows in ALONE.items()}
AT_CFG_1 |= {form: reading * 3 + rest * 2 for form, (reading, rest) in ENDING.items()}


@pytest.mark.parametrize("form", AT_CFG_1)
def test_cfg_override_saves_the_negative_beside_every_edit(tiny: Tiny, form: str) -> None:
    """As cfg 1 does, and from a step on as a run whose cfg falls to 1 there: the same rows and the same bits."""
    node, _, inputs = FORMS[form]
    counted, rows = rows_of(tiny.model)
    parts = {"positive": tiny.target, "noise": tiny.noise} | inputs(tiny)

    def edited(model: ModelPatcher) -> ModelPatcher:
        return node(model, tiny)

    def sample(model: ModelPatcher, *cfgs: float) -> tuple[list[int], Tensor]:
        """cfgs: of the run's first steps, the last of them of all others too."""
        guider = CFGGuider(model)
        guider.set_conds(parts["positive"], tiny.negative)
        guider.set_cfg(cfgs[0])

        def after(step: int, *_) -> None:
            guider.set_cfg(cfgs[min(step + 1, len(cfgs) - 1)])

        rows.clear()
        zeros = torch.zeros_like(parts["noise"])
        result = guider.sample(zeros, parts["noise"], EULER, tiny.sigmas, None, after, True, 0)
        return [*rows], result

    for start, cfgs in ((None, [1.0]), (LATE, [CFG] * LATE + [1.0])):
        expected, wanted = sample(edited(counted), *cfgs)
        assert start is not None or expected == AT_CFG_1[form]
        for model in in_both_orders(edited, counted, None if start is None else tiny.sigmas[start]):
            found, result = sample(model, CFG)
            assert found == expected
            assert torch.equal(result, wanted)
    every_row, guided_throughout = sample(edited(counted), CFG)
    assert sum(AT_CFG_1[form]) < sum(expected) < sum(every_row)
    assert not torch.equal(wanted, guided_throughout)


GUIDERS: dict[str, Callable[[Tiny, ModelPatcher, float], CFGGuider]] = {
    "Basic Guider": lambda tiny, model, cfg: BasicGuider.execute(model, tiny.target).result[0],
    "Dual Model CFG Guider": lambda tiny, model, cfg: DualModelGuider.execute(
        model, tiny.target, cfg, model, tiny.negative
    ).result[0],
    "Perp-Neg Guider": lambda tiny, model, cfg: PerpNegGuider.execute(
        model, tiny.target, tiny.negative, conditioning(6), cfg, 0.0
    ).result[0],
}


@each_kind
@pytest.mark.parametrize("name", GUIDERS)
def test_cfg_override_saves_it_in_other_guiders(tiny: Tiny, name: str, kind: str) -> None:
    counted, rows = rows_of(tiny.model)

    def sample(model: ModelPatcher, cfg: float) -> Tensor:
        rows.clear()
        guider = GUIDERS[name](tiny, model, cfg)
        return guider.sample(torch.zeros_like(tiny.noise), tiny.noise, EULER, tiny.sigmas, disable_pbar=True, seed=0)

    def edited(model: ModelPatcher) -> ModelPatcher:
        return attach(model, tiny.trajectory, edit(kind))

    wanted = sample(edited(counted), 1.0)
    assert rows == [2] * STEPS
    for model in in_both_orders(edited, counted):
        assert torch.equal(sample(model, CFG), wanted)
        assert rows == [2] * STEPS


@pytest.mark.parametrize("kind", ["none", "swap", "pnp"])
@pytest.mark.parametrize("name", PRESETS)
def test_cfg_override_saves_it_without_inversion(tiny: Tiny, name: str, kind: str) -> None:
    counted, rows = rows_of(tiny.model)

    def sample(before: bool, behind: bool, cfg: float) -> Tensor:
        rows.clear()
        model, trajectory = virtual(tiny, name, override(counted) if before else counted)
        model = attach(model, trajectory, edit(kind)) if kind != "none" else model
        model = override(model) if behind else model
        return resample(model, trajectory, Guidance(tiny.target, tiny.negative, cfg), sampler_of(name))

    wanted = sample(False, False, 1.0)
    assert rows == [2] * STEPS
    for before in (True, False):
        assert torch.equal(sample(before, not before, CFG), wanted)
        assert rows == [2] * STEPS


@pytest.mark.parametrize("name", ["EDICT", "edit-friendly"])
def test_cfg_override_saves_it_in_the_packs_samplers(tiny: Tiny, name: str) -> None:
    source = Guidance(tiny.source, tiny.negative, 3.0)
    if name == "EDICT":
        trajectory, sampler = invert_edict(tiny.model, source, tiny.image, tiny.sigmas, 0.93)
    else:
        trajectory, sampler = invert_edit_friendly(tiny.model, source, tiny.image, tiny.sigmas, 1.0, 0)
    counted, rows = rows_of(tiny.model)

    def edited(model: ModelPatcher) -> ModelPatcher:
        return attach(model, trajectory, edit("swap"))

    def sample(model: ModelPatcher, cfg: float) -> Tensor:
        rows.clear()
        return resample(model, trajectory, Guidance(tiny.target, tiny.negative, cfg), sampler)

    wanted, calls = sample(edited(counted), 1.0), (2 if name == "EDICT" else 1) * STEPS + 1
    assert rows == [2] * calls  # the first is made twice
    for model in in_both_orders(edited, counted):
        assert torch.equal(sample(model, CFG), wanted)
        assert rows == [2] * calls


def test_nothing_is_pulled_by_the_mask_of_an_earlier_step(tiny: Tiny) -> None:
    """Where the negative is left out there is no difference that says what is unchanged."""
    model = attach_rule(tiny.model, Proximal(1.0, 1.0, 0.0, INVERSION), tiny.trajectory)
    late = tiny.trajectory._replace(states=tiny.trajectory.states[LATE:], sigmas=tiny.sigmas[LATE:])
    wanted = tiny.sample(tiny.model, cfg=1.0, sigmas=late.sigmas, noise=noise_latent(tiny.model, late))
    result = tiny.sample(override(model, tiny.sigmas[LATE]))
    assert (result - wanted).norm() < 1e-5 * wanted.norm()
    assert (tiny.sample(model) - wanted).norm() > 0.05 * wanted.norm()


def test_a_negative_that_moves_a_latent_is_not_saved(tiny: Tiny) -> None:
    """It is refused, as at cfg 1; where the latents do not move any more it is saved."""
    model, rows = rows_of(tiny.model)

    def moved(model: ModelPatcher, end: float = 1.0) -> ModelPatcher:
        return attach_guide(model, tiny.trajectory, CrossAttentionGuidance(0.1, end, 64, True), True)

    for other in in_both_orders(moved, model):
        with pytest.raises(ValueError, match="the negative prompt, which this run leaves out: raise cfg, and that of"):
            tiny.sample(other)
    rows.clear()
    tiny.sample(override(moved(model, LATE / STEPS), tiny.sigmas[LATE]))
    assert rows[-3:] == [1] * 3


# --- sources ---------------------------------------------------------------------------------------------------------


def test_a_mask_alone_needs_no_source(tiny: Tiny) -> None:
    model, rows = rows_of(tiny.model)
    mask = (torch.arange(8) < 4).float().expand(1, 8, 8)
    tiny.sample(attach_blend(model, tiny.trajectory, LocalBlend(None, 0, None, 0.3, 0.3, 0.2, 0, mask, False)))
    assert rows == [2] * STEPS


# --- batches ---------------------------------------------------------------------------------------------------------

IMAGES = 3


@pytest.fixture(scope="module")
def batch() -> Tiny:
    with torch.inference_mode():
        return Tiny(STEPS, IMAGES)


def recorded(tiny: Tiny, model: ModelPatcher) -> None:
    zeros = torch.zeros_like(tiny.noise)
    record(model, Guidance(tiny.source, None, 1.0), EULER, tiny.sigmas, zeros, tiny.noise, 0)


def inverted(cfg: float = 1.0, iterations: int = 0) -> Callable[[Tiny, ModelPatcher], object]:
    def run(tiny: Tiny, model: ModelPatcher) -> None:
        guidance = Guidance(tiny.source, tiny.negative, cfg)
        invert(model, guidance, tiny.image, tiny.sigmas, Refinement(iterations))

    return run


SOURCES: dict[str, tuple[Callable[[Tiny, ModelPatcher], object], int]] = {
    "DDIM Inversion": (inverted(), 1),
    "DDIM Inversion, 2 iterations": (inverted(iterations=2), 3),
    "Record Trajectory": (recorded, 1),
    "Record Attention": (lambda tiny, model: stored(model, tiny), 1),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_batch_is_inverted_and_recorded_in_one_go(batch: Tiny, name: str) -> None:
    make, calls = SOURCES[name]
    model, rows = rows_of(batch.model)
    make(batch, model)
    assert rows == [IMAGES] * STEPS * calls


def test_a_batch_takes_as_many_calls_as_one_image(tiny: Tiny, batch: Tiny) -> None:
    """Where a node calls more than once a step, or makes sure of something first."""
    counts = []
    for parts in (tiny, batch):
        model, rows = rows_of(parts.model)
        guidance = Guidance(parts.source, parts.negative, 3.0)
        inverted(cfg=3.0)(parts, model)
        invert_edict(model, guidance, parts.image, parts.sigmas, 0.93)
        invert_edit_friendly(model, guidance, parts.image, parts.sigmas, 1.0, 0)
        counts.append([*rows])
    alone, together = counts
    assert together == [IMAGES * count for count in alone]


@each_kind
def test_a_batch_is_edited_in_one_go(batch: Tiny, kind: str) -> None:
    counted, rows = rows_of(batch.model)
    store = stored(batch.model, batch)
    for which, cfg, expected in ((None, CFG, 3), (None, 1.0, 2), (store, CFG, 2), (store, 1.0, 1)):
        rows.clear()
        batch.sample(attach(counted, batch.trajectory, edit(kind), which), cfg=cfg)
        assert rows == [IMAGES * expected] * STEPS


@pytest.mark.parametrize("name", PRESETS)
def test_a_batch_is_edited_without_inversion_in_one_go(batch: Tiny, name: str) -> None:
    counted, rows = rows_of(batch.model)
    model, trajectory = virtual(batch, name, counted)
    resample(model, trajectory, Guidance(batch.target, batch.negative, CFG), sampler_of(name))
    assert rows == [IMAGES * 3] * STEPS
