"""Plug-and-Play and MasaCtrl: against their formulas in float64, alone, together, and from a store."""

from __future__ import annotations

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel
from torch import Tensor

from palimpsest.attention.masactrl import MasaCtrl
from palimpsest.attention.p2p import Window
from palimpsest.attention.pnp import PRESETS, PlugAndPlay
from palimpsest.attention.record import Recording, record_attention
from palimpsest.attention.viewer import components, self_attention
from palimpsest.benchmarks.architectures import CONFIGS, UNETS
from palimpsest.host.branch.blocks import last_layers, named, parse_blocks
from palimpsest.host.branch.source import attach
from palimpsest.host.layer import Inputs, Layer
from palimpsest.host.unet.tree import all_layers, blocks_with, decoder_from_second
from palimpsest.inversion.run import Guidance, record
from palimpsest.nodes.inject import MasaCtrlNode, PnPFeatureInjector
from palimpsest.nodes.viewer import FEATURES, SELF_ATTENTION, FeatureViewer
from reference import classic_run, explicit
from test_source import NEVER, some_mapper, split, swap
from tiny import Tiny, execute, rows_of

ALWAYS = Window(0, 1)
FEATURE, ATTENTION = (("output", 1),), (("output", 1), ("output", 2), ("output", 3))
PNP = PlugAndPlay(FEATURE, ATTENTION, 0.8, 0.4)


def layers_from(tiny: Tiny, first: int) -> frozenset:
    return last_layers(tiny.model.model.diffusion_model, first)


def masactrl(tiny: Tiny, first: int = 3, start: float = 0.2, union: bool = False, masks=None) -> MasaCtrl:
    return MasaCtrl(layers_from(tiny, first), start, union, masks)


def kv_edit(tiny: Tiny, mask: Tensor) -> MasaCtrl:
    return MasaCtrl(layers_from(tiny, 0), 0.2, False, None, mask)


def classic_pnp(tiny: Tiny, edit: PlugAndPlay) -> Tensor:
    """Equations 5 and 6: f and A of the source for the first steps, for the target's two rows alike."""
    kept = {}

    def attend(step: int, role: str, place: tuple, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own, (kind, *block, _) = explicit(q, k), place
        if role == "source":
            kept[place] = own
        elif kind == "self" and tuple(block) in edit.attention and step < edit.tau_a * tiny.steps:
            own = kept[place]
        return own @ v

    def feature(step: int, role: str, block: tuple, h: Tensor) -> Tensor:
        if role == "source":
            kept[block] = h
        return kept[block] if block in edit.features and step < edit.tau_f * tiny.steps else h

    return classic_run(tiny, 4.0, attend, feature)


def classic_masactrl(tiny: Tiny, first: int, start: int, union: bool = False, masks=None, mask=None) -> Tensor:
    """Equations 6 to 9, and the public code's union variant; KV-Edit's mask."""
    kept = {}
    layers = {(*block, index) for block, index in layers_from(tiny, first)}

    def attend(step: int, role: str, place: tuple, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kind, *where = place
        if role == "source":
            kept[place] = k, v
        elif kind == "self" and tuple(where) in layers and step >= start:
            of_source, values = kept[place]
            if mask is not None:
                side = int(q.shape[2] ** 0.5)
                own = mask.reshape(side, 8 // side, side, 8 // side).mean((1, 3)).flatten()[:, None] > 0.5
                return explicit(q, torch.where(own, k, of_source)) @ torch.where(own, v, values)
            if union:
                return explicit(q, torch.cat([of_source, k], 2)) @ torch.cat([values, v], 2)
            if masks is None:
                return explicit(q, of_source) @ values
            side = int(q.shape[2] ** 0.5)
            here, there = (m.double().reshape(side, 8 // side, side, 8 // side).mean((1, 3)).flatten() for m in masks)
            if len((here > 0.5).unique()) == 1:  # nothing to keep apart
                return explicit(q, of_source) @ values
            logits = q @ of_source.transpose(-1, -2) * q.shape[-1] ** -0.5
            fore, back = (
                logits.masked_fill(~part, -torch.inf).softmax(-1) @ values for part in (here > 0.5, here <= 0.5)
            )
            return there[:, None] * fore + (1 - there[:, None]) * back
        return explicit(q, k) @ v

    return classic_run(tiny, 4.0, attend)


def close(tiny: Tiny, ours: Tensor, theirs: Tensor) -> bool:
    ours, plain = (tiny.model.model.process_latent_in(x) for x in (ours, tiny.sample(tiny.model)))
    assert (plain - theirs).norm() > 1e-3 * theirs.norm()  # the edit does something here
    return bool((ours - theirs).norm() < 1e-4 * theirs.norm())


@pytest.mark.parametrize("edit", [PNP, PlugAndPlay(FEATURE, (), 1.0, 0.0), PlugAndPlay((), ATTENTION, 0.0, 0.6)])
@pytest.mark.parametrize("no_memory", [False, True])
def test_pnp_equals_its_equations(
    tiny: Tiny, edit: PlugAndPlay, no_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if no_memory:
        split(monkeypatch, tiny)
    assert close(tiny, tiny.sample(attach(tiny.model, tiny.trajectory, edit)), classic_pnp(tiny, edit))


def rectangle(rows: slice, columns: slice, value: float = 1.0) -> Tensor:
    mask = torch.zeros(8, 8)
    mask[rows, columns] = value
    return mask


ALL = slice(None)
MASKS = rectangle(slice(4), slice(6)), rectangle(slice(2, 8), slice(1, 5))
DISK = ((torch.arange(8)[:, None] - 3.5) ** 2 + (torch.arange(8) - 3.5) ** 2 < 8).float()
MASKED = {
    "counts that divide": MASKS,
    "counts without a common divisor": (rectangle(slice(1, 4), slice(2, 7)), MASKS[1]),
    "disks": (DISK, DISK.roll(2, 0)),
    "one position, which the small layers lose": (rectangle(slice(3, 4), slice(5, 6)), MASKS[1]),
    "soft": (MASKS[0], rectangle(ALL, slice(5), 0.3) + rectangle(slice(3), ALL, 0.7)),
    "no source": (rectangle(ALL, ALL, 0.0), MASKS[1]),
    "all source": (rectangle(ALL, ALL), MASKS[1]),
    "no target": (DISK, rectangle(ALL, ALL, 0.0)),
    "all target": (DISK, rectangle(ALL, ALL)),
}


@pytest.mark.parametrize(("union", "masks"), [(False, None), (True, None), (False, MASKS)])
@pytest.mark.parametrize("no_memory", [False, True])
def test_masactrl_equals_its_equations(
    tiny: Tiny, union: bool, masks, no_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if no_memory:
        split(monkeypatch, tiny)
    edit = masactrl(tiny, 3, 0.2, union, masks)
    theirs = classic_masactrl(tiny, 3, 1, union, masks)
    assert close(tiny, tiny.sample(attach(tiny.model, tiny.trajectory, edit)), theirs)


@pytest.mark.parametrize("mask", [MASKS[1], DISK, rectangle(slice(3, 4), slice(5, 6)), rectangle(ALL, ALL, 0.0)])
@pytest.mark.parametrize("no_memory", [False, True])
def test_kv_edits_mask_equals_its_formula(
    tiny: Tiny, mask: Tensor, no_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if no_memory:
        split(monkeypatch, tiny)
    ours = tiny.sample(attach(tiny.model, tiny.trajectory, kv_edit(tiny, mask[None])))
    assert close(tiny, ours, classic_masactrl(tiny, 0, 1, mask=mask))


@pytest.mark.parametrize("name", MASKED)
def test_any_mask_is_exact_and_costs_no_more_than_none(tiny: Tiny, name: str) -> None:
    """Pairs of queries and keys are counted, and the keys of the longest call."""
    calls: list[tuple[int, int]] = []

    def count(function, q: Tensor, k: Tensor, *args, **kwargs) -> Tensor:
        if k.shape[1] != 77:
            calls.append((len(q) * q.shape[1] * k.shape[1], k.shape[1]))
        return function(q, k, *args, **kwargs)

    def counted(masks: tuple[Tensor, Tensor] | None) -> tuple[Tensor, int, int]:
        calls.clear()
        model = attach(tiny.model, tiny.trajectory, masactrl(tiny, 3, 0.2, False, masks))
        model.model_options["transformer_options"]["optimized_attention_override"] = count
        return tiny.sample(model), sum(pairs for pairs, _ in calls), max(keys for _, keys in calls)

    ours, pairs, longest = counted(MASKED[name])
    _, most, positions = counted(None)
    assert close(tiny, ours, classic_masactrl(tiny, 3, 1, False, MASKED[name]))
    assert longest == positions == 64
    assert pairs <= most


def test_masks_reach_into_another_pack_s_attention(tiny: Tiny) -> None:
    """Placed by block or by layer, before or after the edit: it is asked for each part, then for all rows."""
    seen = []

    def own(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        seen.append((len(q), k.shape[1], options["cond_or_uncond"]))
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, options["n_heads"])

    edit = masactrl(tiny, 3, 0.8, False, MASKED["disks"])
    expected = tiny.sample(attach(tiny.model, tiny.trajectory, edit))
    for place in (("output", 1), ("output", 1, 0)):
        for first in (False, True):
            model = tiny.model if first else attach(tiny.model, tiny.trajectory, edit)
            model = model.clone()
            model.set_model_attn1_replace(own, *place)
            model = attach(model, tiny.trajectory, edit) if first else model
            seen.clear()
            torch.testing.assert_close(tiny.sample(model), expected, rtol=1e-4, atol=1e-4)
            foreground = int(DISK.view(4, 2, 4, 2).mean((1, 3)).gt(0.5).sum())
            assert [(rows, keys) for rows, keys, _ in seen[-3:]] == [(2, foreground), (2, 16 - foreground), (3, 16)]
            assert [sorted(kinds) for _, _, kinds in seen[-3:]] == [[0, 1], [0, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        (lambda model: TomePatchModel.execute(model, 0.5), "changed a layer of 64 positions to 32, where words are"),
        (lambda model: HyperTile.execute(model, 32, 1, 0, False), "changed a layer of 64 positions to 16, where words"),
        (lambda model: PerturbedAttentionGuidance.execute(model, 3.0), "self-attention of middle block 0 by one that"),
    ],
)
def test_masks_refuse_who_moves_positions(tiny: Tiny, node, sentence: str) -> None:
    model = attach(tiny.model, tiny.trajectory, masactrl(tiny, 0, 0.0, False, MASKS))
    with pytest.raises(ValueError, match=sentence):
        tiny.sample(node(model)[0])


def test_masks_leave_self_attention_guidance_its_map(tiny: Tiny) -> None:
    model = attach(tiny.model, tiny.trajectory, masactrl(tiny, 0, 0.0, False, MASKED["disks"]))
    guided = tiny.sample(SelfAttentionGuidance.execute(model, 0.5, 2.0)[0])
    assert torch.isfinite(guided).all()
    assert not torch.allclose(guided, tiny.sample(model), rtol=1e-3)


@pytest.mark.parametrize(
    "others",
    [
        lambda model: TomePatchModel.execute(model, 0.5)[0],
        lambda model: HyperTile.execute(model, 32, 1, 0, False)[0],
    ],
)
def test_kv_edits_mask_beside_who_moves_queries(tiny: Tiny, others) -> None:
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    results = [tiny.sample(others(attach(tiny.model, tiny.trajectory, kv_edit(tiny, m)))) for m in (mask, 0 * mask)]
    assert torch.isfinite(results[0]).all()
    assert not torch.allclose(*results, rtol=1e-3)


def test_each_image_has_its_own_mask(tiny: Tiny) -> None:
    """One row of the source serves both."""
    masks = torch.zeros(2, 8, 8)
    masks[0, :4] = masks[1, :, 4:] = 1
    both = tiny.sample(attach(tiny.model, tiny.trajectory, kv_edit(tiny, masks)), noise=tiny.noise.repeat(2, 1, 1, 1))
    for result, mask in zip(both.split(1), masks.split(1), strict=True):
        alone = tiny.sample(attach(tiny.model, tiny.trajectory, kv_edit(tiny, mask)))
        torch.testing.assert_close(result, alone, rtol=1e-3, atol=1e-3)


def test_layers_of_a_call_share_what_masks_come_to(tiny: Tiny) -> None:
    """On a graphics card each would be a copy to it, in every layer."""
    layer, inputs = Layer("self", "output", 1, 0, 8, 8), Inputs(*(torch.zeros(1, 64, 4) for _ in range(3)))
    half = (torch.arange(64) < 32).view(8, 8).float()
    rule = masactrl(tiny, masks=(half, half)).at(0.5)
    first, second = (rule.read(layer, inputs, inputs)[0].parts for _ in range(2))
    assert len(first) == 2
    assert first is second
    smaller = Inputs(*(torch.zeros(1, 16, 4) for _ in range(3)))
    assert len(rule.read(layer._replace(height=4, width=4), smaller, smaller)[0].parts[0].keys) == 8


def test_no_op_settings_equal_the_plain_sampler_bit_for_bit(tiny: Tiny) -> None:
    plain = tiny.sample(tiny.model)
    everywhere = kv_edit(tiny, torch.ones(1, 8, 8))
    for edit in (PlugAndPlay(FEATURE, ATTENTION, 0.0, 0.0), masactrl(tiny, start=1.0), everywhere):
        assert torch.equal(tiny.sample(attach(tiny.model, tiny.trajectory, edit)), plain)


def test_full_injection_with_equal_prompts_keeps_the_source(tiny: Tiny) -> None:
    """Everything injected and the source's prompt at cfg 1: exactly the source that the same sampler made, and nearer
    to one that was inverted than without.
    """
    unet = tiny.model.model.diffusion_model
    decoder = tuple(("output", i) for i in range(len(unet.output_blocks)))
    edit = PlugAndPlay(decoder, tuple(blocks_with(unet, SpatialTransformer)), 1.0, 1.0)
    guidance, zeros = Guidance(tiny.source, None, 1.0), torch.zeros_like(tiny.noise)
    euler = comfy.samplers.sampler_object("euler")
    made, image = record(tiny.model, guidance, euler, tiny.sigmas, zeros, tiny.noise, 0)
    result = tiny.sample(attach(tiny.model, made, edit), positive=tiny.source, cfg=1.0)
    assert (result - image).norm() < 1e-5 * image.norm()
    result = tiny.sample(attach(tiny.model, tiny.trajectory, edit), positive=tiny.source, cfg=1.0)
    inverted = tiny.model.model.process_latent_out(tiny.trajectory.states[-1])
    assert (result - inverted).norm() < 0.85 * (image - inverted).norm()


@pytest.mark.parametrize("name", ["pnp", "masactrl"])
def test_rows_a_step(tiny: Tiny, name: str) -> None:
    model, rows = rows_of(tiny.model)
    tiny.sample(attach(model, tiny.trajectory, PNP if name == "pnp" else masactrl(tiny, start=0.6)))
    assert rows == ([3, 3, 3, 3, 2] if name == "pnp" else [2, 2, 2, 3, 3])


COPIED = {"pnp": ({"query", "key"}, 1), "masactrl": ({"key", "value"}, 1), "p2p": ({"query", "key"}, 1)}


@pytest.mark.parametrize("name", COPIED)
def test_what_a_layer_reads_is_copied_once(tiny: Tiny, name: str) -> None:
    """The host gives a layer one tensor as queries, keys and values: a changed one is held beside it, and no third."""
    made = {"pnp": PNP, "masactrl": masactrl(tiny, 0, start=0.0), "p2p": swap(some_mapper())}[name]
    alike, held = COPIED[name]
    seen: list[tuple[set[str], int]] = []

    def look(query: Tensor, key: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
        places: dict[int, set[str]] = {}
        for field, tensor in zip(Inputs._fields, (query, key, value), strict=True):
            places.setdefault(tensor.data_ptr(), set()).add(field)
        seen.append((max(places.values(), key=len), len(places) - 1))
        return query, key, value

    model = attach(tiny.model, tiny.trajectory, made)
    model.set_model_attn1_patch(look)
    tiny.sample(model)
    assert (alike, held) in seen
    assert all(more <= held for _, more in seen)


@pytest.mark.parametrize("name", ["pnp", "masactrl", "masked masactrl"])
def test_a_store_stands_in_for_the_source_row(tiny: Tiny, name: str) -> None:
    edit = PNP if name == "pnp" else masactrl(tiny, masks=MASKED["disks"] if "masked" in name else None)
    recording = Recording(NEVER, ALWAYS, 64, 1 << 30, torch.float32, torch.device("cpu"), ALWAYS, FEATURE)
    store = record_attention(tiny.model, tiny.trajectory, recording)
    model, rows = rows_of(tiny.model)
    stored, live = (tiny.sample(attach(model, tiny.trajectory, edit, which)) for which in (store, None))
    assert rows[:5] == [2] * 5
    assert (stored - live).norm() < 1e-5 * live.norm()
    without = record_attention(tiny.model, tiny.trajectory, Recording(**{**vars(recording), "features": ()}))
    rows.clear()
    tiny.sample(attach(model, tiny.trajectory, edit, without))
    assert rows == ([3, 3, 3, 3, 2] if name == "pnp" else [2] * 5)


def test_a_batch_equals_its_images(tiny: Tiny) -> None:
    both = Tiny(batch=2)
    for edit in (PNP, masactrl(both)):
        result = both.sample(attach(both.model, both.trajectory, edit))
        for i in range(2):
            trajectory = both.trajectory._replace(states=both.trajectory.states[:, i : i + 1])
            alone = both.sample(attach(both.model, trajectory, edit), noise=both.noise[i : i + 1])
            torch.testing.assert_close(result[i : i + 1], alone, rtol=1e-3, atol=1e-3)


def test_they_stand_together_where_that_has_a_meaning(tiny: Tiny) -> None:
    cross_only = swap(some_mapper(), self_=NEVER)
    alone = tiny.sample(attach(tiny.model, tiny.trajectory, PNP))
    both = attach(attach(tiny.model, tiny.trajectory, cross_only), tiny.trajectory, PNP)
    together = tiny.sample(both)
    assert not torch.allclose(together, alone, rtol=1e-3)
    late = masactrl(tiny, start=0.4)  # attention injection of PNP ends there
    tiny.sample(attach(both, tiny.trajectory, late))
    with pytest.raises(ValueError, match="PnP Feature Injector and MasaCtrl on this MODEL both replace the self-att"):
        tiny.sample(attach(both, tiny.trajectory, masactrl(tiny, start=0.2)))
    with pytest.raises(ValueError, match="P2P Attention Controller and PnP Feature Injector on this MODEL"):
        tiny.sample(attach(attach(tiny.model, tiny.trajectory, swap()), tiny.trajectory, PNP))


def test_an_interrupt_leaves_no_hook_behind(tiny: Tiny) -> None:
    before = tiny.sample(tiny.model)
    model = attach(tiny.model, tiny.trajectory, PNP)
    expected = tiny.sample(model)
    calls = 0

    def interrupt(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise comfy.model_management.InterruptProcessingException
        return v[:, :1].expand_as(q)

    broken = model.clone()
    broken.set_model_attn1_replace(interrupt, "output", 2)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tiny.sample(broken)
    assert torch.equal(tiny.sample(tiny.model), before)
    assert torch.equal(tiny.sample(model), expected)
    assert not any(block[0].out_layers[-1]._forward_hooks for block in tiny.model.model.diffusion_model.output_blocks)


def test_blocks_as_people_write_them(tiny: Tiny) -> None:
    unet = tiny.model.model.diffusion_model
    valid = [("input", 1), ("middle", 0), *(("output", i) for i in range(4))]
    assert parse_blocks("output 1-2, middle, 3, input 1", valid, "x") == (
        ("output", 1),
        ("output", 2),
        ("middle", 0),
        ("output", 3),
        ("input", 1),
    )
    assert parse_blocks(" ", valid, "x") == ()
    for text, bad in (("output 7", "output 7"), ("1, outer 2", "outer 2"), ("output 2-9", "output 2-9")):
        with pytest.raises(ValueError, match=rf"x has '{bad}', but .* are input 1; middle; output 0-3"):
            parse_blocks(text, valid, "x")
    assert named(decoder_from_second(unet)) == "output 1-3"
    assert len(all_layers(unet)) == 7
    with pytest.raises(ValueError, match="begins at attention layer 7, but this MODEL has 7"):
        layers_from(tiny, 7)


@pytest.mark.parametrize(
    ("kind", "blocks", "layers", "first"),
    [("sd15", "output 4-11", 16, (("output", 6), 0)), ("sdxl", "output 1-5", 70, (("output", 0), 9))],
)
def test_layers_of_true_architectures(kind: str, blocks: str, layers: int, first: tuple) -> None:
    """The papers' layers for SD1.5; for SDXL the same depth into the decoder, and 43 of MasaCtrl's 70."""
    config = CONFIGS[kind](UNETS[kind])
    config.set_inference_dtype(torch.float16, None)
    unet = config.get_model({}, device=torch.device("meta")).diffusion_model
    assert named(decoder_from_second(unet)) == blocks
    assert len(all_layers(unet)) == layers
    replaced = last_layers(unet, -1)
    assert len(replaced) == layers - layers * 10 // 16
    assert next(layer for layer in all_layers(unet) if layer in replaced) == first


def test_nodes_choose_layers_and_refuse_in_a_sentence(tiny: Tiny) -> None:
    parts = {"model": tiny.model, "trajectory": tiny.trajectory}
    for node in (PnPFeatureInjector, MasaCtrlNode):
        (edited,) = execute(node, **parts)
        assert not torch.allclose(tiny.sample(edited), tiny.sample(tiny.model), rtol=1e-3)
    for preset, (tau_f, tau_a) in PRESETS.items():
        (edited,) = execute(PnPFeatureInjector, **parts, preset=preset, tau_f=0.0, tau_a=0.0)
        (written,) = execute(PnPFeatureInjector, **parts, tau_f=tau_f, tau_a=tau_a)
        assert torch.equal(tiny.sample(edited), tiny.sample(written))
    with pytest.raises(ValueError, match="needs both masks or neither: connect target_mask"):
        execute(MasaCtrlNode, **parts, source_mask=torch.ones(1, 8, 8))
    with pytest.raises(ValueError, match="which union mixes"):
        execute(MasaCtrlNode, **parts, source_mask=torch.ones(1, 8, 8), target_mask=torch.ones(1, 8, 8), union=True)
    with pytest.raises(ValueError, match="2 source masks, 1 target masks and 1 images"):
        execute(MasaCtrlNode, **parts, source_mask=torch.ones(2, 8, 8), target_mask=torch.ones(1, 8, 8))
    masks = dict.fromkeys(("source_mask", "target_mask", "mask"), torch.ones(1, 8, 8))
    with pytest.raises(ValueError, match="its own: disconnect source_mask and target_mask, or mask"):
        execute(MasaCtrlNode, **parts, **masks)


def test_components_are_those_of_the_covariance() -> None:
    """Against the singular value decomposition of the centred features, up to sign and scale."""
    features = torch.randn(2, 100, 60, generator=torch.Generator().manual_seed(0)) * 1.1 ** torch.arange(60)
    found = components(features).flatten(0, 1)
    flat = features.flatten(0, 1) - features.flatten(0, 1).mean(0)
    left, values, _ = torch.linalg.svd(flat, full_matrices=False)
    for i in range(3):
        expected = left[:, i] * values[i]
        correlation = torch.corrcoef(torch.stack([found[:, i], expected]))[0, 1]
        assert correlation.abs() > 1 - 1e-5
    assert found.amin(0).tolist() == [0, 0, 0]
    assert found.amax(0).tolist() == [1, 1, 1]


def test_viewer_shows_what_was_recorded(tiny: Tiny) -> None:
    recording = Recording(NEVER, Window(0, 0.6), 64, 1 << 30, torch.float32, torch.device("cpu"), ALWAYS, FEATURE)
    store = record_attention(tiny.model, tiny.trajectory, recording)
    parts = {"model": tiny.model, "attention_store": store}
    for show, count in ((FEATURES, 5), (SELF_ATTENTION, 3)):
        (pictures,) = execute(FeatureViewer, **parts, show=show, pictures=9)
        assert pictures.shape == (count, 64, 64, 3)
        assert pictures.amin() == 0
        assert pictures.amax() == 1
    with pytest.raises(ValueError, match="block of Feature Viewer has 'input 2'"):
        execute(FeatureViewer, **parts, show=SELF_ATTENTION, block="input 2")
    bare = record_attention(tiny.model, tiny.trajectory, Recording(**{**vars(recording), "self_": NEVER}))
    with pytest.raises(ValueError, match="raise self_replace in Record Attention"):
        execute(FeatureViewer, model=tiny.model, attention_store=bare)


def test_self_attention_is_the_mean_over_heads() -> None:
    q, k = torch.randn(2, 1, 9, 8, generator=torch.Generator().manual_seed(0)).unbind()
    heads = [explicit(q[..., at], k[..., at]) for at in (slice(4), slice(4, 8))]
    torch.testing.assert_close(self_attention(q, k, 2), torch.stack(heads).mean(0))


def test_features_are_watched_at_one_place_only(tiny: Tiny) -> None:
    """The residual branch of the chosen block: its own features in, the source's out, and no other block's."""
    seen = []

    def watch(executor, x: Tensor, *args, **kwargs):
        hooks = [bool(b[0].out_layers[-1]._forward_hooks) for b in tiny.model.model.diffusion_model.output_blocks]
        seen.append(hooks)
        return executor(x, *args, **kwargs)

    model = attach(tiny.model, tiny.trajectory, PlugAndPlay(FEATURE, (), 0.4, 0.0))
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.watch", watch)
    tiny.sample(model)
    assert seen == [[False, True, False, False]] * 2 + [[False] * 4] * 3
