"""Several calls of the model at one sigma, and several prompts in one: whatever is not the source reads alike."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider, calc_cond_batch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_custom_sampler import DualCFGGuider, DualModelGuider
from comfy_extras.nodes_perpneg import PerpNeg, PerpNegGuider
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_slg import SkipLayerGuidanceDiTSimple
from nodes import ConditioningSetMask, ConditioningSetTimestepRange
from torch import Tensor

from palimpsest.host.branch.source import attach, attach_blend
from test_composition import blend, edit, stored
from test_source import split
from tiny import Tiny, conditioning, execute, rows_of, tiny_model

each_edit = pytest.mark.parametrize("kind", ["swap", "refine", "pnp", "masactrl"])
each_injection = pytest.mark.parametrize("kind", ["pnp", "masactrl"])
each_way = pytest.mark.parametrize("way", ["live", "live, split calls", "from a store", "from a store, split calls"])


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    with torch.inference_mode():
        return Tiny(steps=3)


def edited(tiny: Tiny, kind: str, way: str = "live", model: ModelPatcher | None = None) -> ModelPatcher:
    store = stored(tiny.model, tiny) if "store" in way else None
    return attach(model or tiny.model, tiny.trajectory, edit(kind), store)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def run(tiny: Tiny, guider: CFGGuider) -> Tensor:
    sampler = comfy.samplers.sampler_object("euler")
    zeros = torch.zeros_like(tiny.noise)
    return guider.sample(zeros, tiny.noise, sampler, tiny.sigmas, disable_pbar=True, seed=0)


def guided(model: ModelPatcher, positive: list, negative: list, cfg: float) -> CFGGuider:
    guider = CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


# --- calls -----------------------------------------------------------------------------------------------------------


@each_edit
@each_way
def test_a_prompt_alone_reads_as_beside_the_others(
    tiny: Tiny, kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Self-Attention Guidance and others call it, at the sampler's latent or at another."""
    apart = []

    def call_again(args: dict) -> Tensor:
        def call(x: Tensor, *conds: list[dict]) -> list[Tensor]:
            return calc_cond_batch(args["model"], list(conds), x, args["sigma"], args["model_options"])

        positive, negatives, x = args["cond"], args["uncond"], args["input"]
        for latent in (x, x.flip(-1)):
            both = call(latent, positive, negatives)
            (target,) = call(latent, positive)
            others = [call(latent, [negative | {"uuid": uuid.uuid4()}])[0] for negative in negatives]
            apart.append(distance(target, both[0]))
            apart.append(distance(sum(others) / len(others), both[1]))
        return args["denoised"]

    model = edited(tiny, kind, way)
    model.set_model_sampler_post_cfg_function(call_again)
    if "split" in way:
        split(monkeypatch, tiny)
    tiny.sample(model, negative=[*tiny.negative, *conditioning(6)])
    assert len(apart) == 3 * 4
    assert max(apart) < 1e-5


@each_injection
def test_rows_of_a_second_call(tiny: Tiny, kind: str) -> None:
    """Those of Self-Attention Guidance's own call of the negative read from the source, live or from a store."""
    for way, rows_a_step in (("live", [3, 2]), ("from a store", [2, 1])):
        model, rows = rows_of(SelfAttentionGuidance.execute(edited(tiny, kind, way), 0.5, 2.0).result[0])
        tiny.sample(model)
        assert rows == rows_a_step * 3


# --- several negatives -----------------------------------------------------------------------------------------------


@each_edit
@each_way
def test_the_same_negative_twice_is_once(tiny: Tiny, kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = edited(tiny, kind, way)
    once = tiny.sample(model)
    if "split" in way:
        split(monkeypatch, tiny)
    assert distance(tiny.sample(model, negative=[*tiny.negative, *tiny.negative]), once) < 1e-5


@each_edit
def test_negatives_that_share_the_run_or_the_image_are_one(tiny: Tiny, kind: str) -> None:
    model = edited(tiny, kind)
    once = tiny.sample(model)
    first, second = ((tiny.negative[0][0], {"start_percent": s, "end_percent": e}) for s, e in ((0, 0.5), (0.5, 1)))
    assert distance(tiny.sample(model, negative=[[*first], [*second]]), once) < 1e-5
    left = (torch.arange(8) < 3).float().expand(1, 8, 8)
    masked = [*masked_by(tiny.negative, left), *masked_by(tiny.negative, 1 - left)]
    assert distance(tiny.sample(model, negative=masked), once) < 1e-5


# --- other guiders ---------------------------------------------------------------------------------------------------


def dual_model(tiny: Tiny, model: ModelPatcher) -> CFGGuider:
    return DualModelGuider.execute(model, tiny.target, 4.0, model_negative=model, negative=tiny.negative).result[0]


def perp_neg(tiny: Tiny, model: ModelPatcher) -> CFGGuider:
    return PerpNegGuider.execute(model, tiny.target, conditioning(6), tiny.negative, 4.0, 0.0).result[0]


def dual_cfg(style: str) -> Callable[[Tiny, ModelPatcher], CFGGuider]:
    def guider(tiny: Tiny, model: ModelPatcher) -> CFGGuider:
        return DualCFGGuider.execute(model, tiny.target, tiny.negative, conditioning(6), 4.0, 1.0, style).result[0]

    return guider


def prompt_by_prompt(tiny: Tiny, model: ModelPatcher) -> CFGGuider:
    model = SkipLayerGuidanceDiTSimple.execute(model, 0.0, 1.0, "7", "").result[0]
    return guided(model, tiny.target, tiny.negative, 4.0)


GUIDERS = {
    "Dual Model CFG Guider": dual_model,
    "Perp-Neg Guider": perp_neg,
    "Dual CFG Guider": dual_cfg("regular"),
    "Dual CFG Guider, nested": dual_cfg("nested"),
    "SkipLayerGuidanceDiTSimple": prompt_by_prompt,
}


@each_edit
@pytest.mark.parametrize("guider", GUIDERS)
@pytest.mark.parametrize("way", ["live", "from a store"])
def test_a_guider_that_comes_to_cfg_gives_what_cfg_gives(tiny: Tiny, kind: str, guider: str, way: str) -> None:
    """At one model, an empty weight of the second negative, or no layer to skip."""
    model = edited(tiny, kind, way)
    assert distance(run(tiny, GUIDERS[guider](tiny, model)), tiny.sample(model)) < 1e-5


@each_edit
def test_a_negative_that_is_over_leaves_a_call_of_nothing(tiny: Tiny, kind: str) -> None:
    """Where a guider calls it by itself, as where it stands beside the target."""
    negative = ConditioningSetTimestepRange().set_range(tiny.negative, 0.0, 0.5)[0]
    model = edited(tiny, kind)
    guider = DualModelGuider.execute(model, tiny.target, 4.0, model_negative=model, negative=negative).result[0]
    assert distance(run(tiny, guider), tiny.sample(model, negative=negative)) < 1e-5


@each_edit
def test_perp_neg_is_the_same_as_node_and_as_guider(tiny: Tiny, kind: str) -> None:
    model, empty = edited(tiny, kind), conditioning(6)
    node = tiny.sample(PerpNeg.execute(model, empty, 0.7).result[0])
    guider = run(tiny, PerpNegGuider.execute(model, tiny.target, tiny.negative, empty, 4.0, 0.7).result[0])
    assert distance(node, guider) < 1e-5


@each_injection
def test_a_negative_of_another_checkpoint_is_refused(tiny: Tiny, kind: str) -> None:
    """Where it would read from the source, which that checkpoint has not seen."""
    other = tiny_model(seed=9)

    def guider(model: ModelPatcher) -> CFGGuider:
        return DualModelGuider.execute(model, tiny.target, 4.0, model_negative=other, negative=tiny.negative).result[0]

    with pytest.raises(ValueError, match="Guider_DualModel runs a prompt on another checkpoint than the MODEL to edit"):
        run(tiny, guider(edited(tiny, kind)))
    edit_alone = run(tiny, guider(edited(tiny, "swap")))
    assert distance(edit_alone, run(tiny, guider(tiny.model))) > 1e-3


# --- parts of the image or of the batch ------------------------------------------------------------------------------


def masked_by(prompt: list, mask: Tensor, bounds: str = "default") -> list:
    return ConditioningSetMask().append(prompt, mask, bounds, 1.0)[0]


@each_edit
@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("bounds", ["default", "mask bounds"])
def test_masks_on_prompts_are_right_or_refused(tiny: Tiny, kind: str, width: int, bounds: str) -> None:
    model = edited(tiny, kind)
    mask = (torch.arange(8) < width).float().expand(1, 8, 8)
    with pytest.raises(ValueError, match="The target prompt has a mask, outside which nothing would be sampled"):
        tiny.sample(model, positive=masked_by(tiny.target, mask, bounds))
    masked = masked_by(tiny.negative, mask, bounds)
    if bounds == "mask bounds":
        with pytest.raises(ValueError, match="The negative prompt is limited to an area"):
            tiny.sample(model, negative=masked)
    elif width == 8:
        assert distance(tiny.sample(model, negative=masked), tiny.sample(model)) < 1e-5


def test_an_area_that_only_a_node_knows_is_refused(tiny: Tiny) -> None:
    empty = [[conditioning(6)[0][0], {"area": (4, 4, 0, 0), "strength": 1.0}]]
    with pytest.raises(ValueError, match="called on a part of shape .* remove context windows, tiling and areas"):
        tiny.sample(PerpNeg.execute(edited(tiny, "pnp"), empty, 0.7).result[0])


@pytest.mark.parametrize("kind", ["swap", "pnp", None])
@pytest.mark.parametrize("dim", [0, 2])
def test_context_windows_are_refused_where_they_divide_anything(tiny: Tiny, kind: str | None, dim: int) -> None:
    """Also where Local Blend is alone on the MODEL. A window that holds all is none."""

    def windows(length: int) -> ModelPatcher:
        settings = {"context_length": length, "context_overlap": 1, "dim": dim}
        return execute(ContextWindowsManualNode, model=tiny.model, **settings)[0]

    def sample(model: ModelPatcher) -> Tensor:
        model = attach(model, tiny.trajectory, edit(kind)) if kind else model
        return tiny.sample(attach_blend(model, tiny.trajectory, blend(4)), noise=tiny.noise.repeat(3, 1, 1, 1))

    part = "2 of 3 images" if dim == 0 else "a part of shape"
    with pytest.raises(ValueError, match=f"The model is called on {part}.* remove context windows"):
        sample(windows(2))
    assert torch.equal(sample(windows(8)), sample(tiny.model))
