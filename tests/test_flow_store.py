"""Attention stores of flow transformers: maps against explicit ones, edits against the live ones, and exact bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import calc_cond_batch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flows import FLOWS, Flow
from palimpsest.attention import record
from palimpsest.attention.heatmap import word_heat
from palimpsest.attention.p2p import Window
from palimpsest.attention.record import Plan, Recording, record_attention
from palimpsest.demo import model as demo_model
from palimpsest.demo.flow import TEXT_TOKENS, load_flow
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.host.dit.architectures import dit_blocks
from palimpsest.host.files.store import AttentionStore
from palimpsest.host.files.trajectory import Trajectory
from palimpsest.host.run.cost import metered
from palimpsest.host.run.sampler import OwnSampler, Run
from palimpsest.inversion.run import Guidance, ddim_sigmas, invert, resample
from palimpsest.nodes.blend import LocalBlendNode
from palimpsest.nodes.inject import MasaCtrlNode, PnPFeatureInjector
from palimpsest.nodes.maps import AttentionMaps
from palimpsest.nodes.p2p import P2PAttentionController
from palimpsest.nodes.prompt import PromptEdit
from palimpsest.nodes.store import RecordAttention
from palimpsest.nodes.viewer import FeatureViewer
from reference import explicit
from test_flow_edit import CFG, STEPS, Parts, close, every_flow
from test_flow_words import ALWAYS, WORDED, Rows, Shown, phrases, setting, written_out
from test_p2p import KINDS, NEVER, ours, published, windowed
from test_store import same
from tiny import execute, run

WHOLE, CPU = 1 << 40, torch.device("cpu")
EVERYTHING = ("query", "key", "value")


def recording(cross: Window = ALWAYS, self_: Window = ALWAYS, **changes) -> Recording:
    parts = {"self_positions": math.inf, "budget": WHOLE, "dtype": torch.float32, "device": CPU}
    return Recording(cross, self_, **parts | changes)


def guidance_of(parts: Parts) -> Guidance:
    return Guidance(parts.target, parts.negative, CFG)


def rows(model: ModelPatcher, trajectory: Trajectory, guidance: Guidance) -> tuple[Tensor, list[int]]:
    """The edit, and the rows of its steps: a step may take several calls."""
    model, cost = metered(model)
    return resample(model, trajectory, guidance), cost.rows


# --- maps ------------------------------------------------------------------------------------------------------------


class Explicit(OwnSampler):
    """Visits the states, and keeps the image's maps of words, the softmax of all tokens written out in float64."""

    def __init__(self, flow: Flow, trajectory: Trajectory, words: int) -> None:
        self.flow, self.trajectory, self.words = flow, trajectory, words
        self.maps: list[Tensor] = []  # by step [b, positions, words], means over heads and blocks

    def walk(self, run: Run) -> Tensor:
        model = run.guider.inner_model
        for i, sigma, _ in run.steps():
            blocks: list[Tensor] = []

            def keep(block: int, own: Rows, blocks: list[Tensor] = blocks) -> Tensor:
                maps = explicit(own.query.double(), own.key.double())
                blocks.append(maps[:, :, own.image, : self.words].mean(1))
                return (maps @ own.value.double()).to(own.value)

            state = self.trajectory.states[i].to(run.latent)
            options = run.model_options["transformer_options"]
            with written_out(model.diffusion_model, self.flow, options, self.words, keep) as changed:
                model_options = {**run.model_options, "transformer_options": changed}
                conds = [run.guider.conds["positive"]]
                calc_cond_batch(model, conds, state, state.new_full((len(state),), sigma), model_options)
            self.maps.append(torch.stack(blocks).mean(0))
        return run.latent


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", WORDED)
def test_maps_are_those_written_out(name: str, images: int) -> None:
    """Also more tokens than a head has channels."""
    flow = FLOWS[name]
    parts, tokens = Parts(flow), 20
    parts.source = flow.prompt(1, tokens)
    image = torch.randn(images, *flow.latent[1:], generator=torch.Generator().manual_seed(4))
    trajectory = invert(parts.model, Guidance(parts.source), image, parts.sigmas)
    store = record_attention(parts.model, trajectory, recording(NEVER, NEVER))
    assert store.bytes == 0
    (maps,) = store.maps
    assert maps.shape == (STEPS, images, 4, 4, tokens)
    written = Explicit(flow, trajectory, tokens)
    guider = comfy.samplers.CFGGuider(parts.model)
    guider.inner_set_conds({"positive": parts.source})
    guider.set_cfg(1.0)
    guider.sample(torch.zeros_like(image), image, written, parts.sigmas, disable_pbar=True, seed=0)
    expected = torch.stack(written.maps)
    share = expected.sum(-1)  # the image's tokens have the rest
    assert (share > 0).all()
    assert (share < 1).all()
    torch.testing.assert_close(maps.flatten(2, 3).double(), expected, rtol=1e-4, atol=1e-7)
    columns = phrases(tokens, 3, 2)[0]
    heat = word_heat(store, columns, (4, 4), 0.0, 1.0, all_sizes=False)
    means = (expected.mean(0) @ columns.double()).transpose(1, 2).flatten(0, 1).unflatten(1, (4, 4))
    torch.testing.assert_close(heat.double(), means / means.amax((1, 2), keepdim=True), rtol=1e-3, atol=1e-3)


def test_maps_of_a_prompt_that_is_padded_behind() -> None:
    """As Flux.2 klein's text encoder pads it; a shorter one the model pads before, as Flux.2 dev's, and has no maps."""
    flow = FLOWS["Flux.2"]
    for tokens, sizes in ((512, [(STEPS, 1, 4, 4, 512)]), (4, [])):
        parts = Parts(flow)
        parts.source = flow.prompt(1, tokens)
        trajectory = invert(parts.model, Guidance(parts.source), parts.image, parts.sigmas)
        store = record_attention(parts.model, trajectory, recording(NEVER, NEVER))
        assert [maps.shape for maps in store.maps] == sizes
        assert all((maps > 0).all() for maps in store.maps)


def test_a_blend_of_words_takes_them_from_a_store() -> None:
    """The maps are the live ones, and no row of the source is run for them."""
    for name in ("Flux", "SD3.5 medium", "Z-Image"):
        parts, trajectory = setting(FLOWS[name])
        store = record_attention(parts.model, trajectory, recording())
        edit = published("reweight o refine", STEPS, 4, 6)
        rule = ours([edit], STEPS, parts.target[0][0], 4, Window(0, 0.4), side=math.inf)
        results, shown = [], []
        for each, expected in ((None, 3), (store, 2)):
            shown.append(Shown(phrases(4, 1), phrases(6, 2)))
            blended = attach_blend(attach(parts.model, trajectory, rule, each), trajectory, shown[-1])
            result, count = rows(blended, trajectory, guidance_of(parts))
            assert sum(count) == expected * STEPS
            results.append(result)
        assert close(*results, 1e-5)
        for live, stored in zip(*(each.maps[-1] for each in shown), strict=True):
            assert close(stored, live, 1e-4)


def test_a_model_that_cuts_its_prompts() -> None:
    """The demo model reads 24 of 77 tokens: the others have maps of zeros, and edits and blends are the live ones."""
    _, clip, vae = demo_model.load()
    model, node = load_flow(), {"source_prompt": "a photo of a cat on a meadow"}
    source, target, edit, _ = execute(PromptEdit, clip=clip, **node, target_prompt="a photo of a dog on a meadow")
    image = torch.rand(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    trajectory = invert(model, Guidance(source), image, ddim_sigmas(model, 3))
    store = record_attention(model, trajectory, recording())
    (maps,) = store.maps
    assert maps.shape == (3, 1, 8, 8, 77)
    assert not maps[..., TEXT_TOKENS:].any()
    assert maps[..., :TEXT_TOKENS].all()
    pictures, masks = execute(AttentionMaps, attention_store=store, prompt_edit=edit, words="cat, meadow")
    assert pictures.shape == (2, 128, 128, 3)
    assert masks.amax((1, 2)).tolist() == [1, 1]
    results = []
    for each, expected in (({}, 6), ({"attention_store": store}, 3)):
        given = {"trajectory": trajectory, "prompt_edit": edit}
        (edited_,) = execute(P2PAttentionController, model=model, **given, **each)
        (blended,) = execute(LocalBlendNode, model=edited_, **given)
        result, count = rows(blended, trajectory, Guidance(target))
        assert sum(count) == expected
        results.append(result)
    assert close(*results, 1e-5)


def test_maps_of_large_pictures_are_means(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Of no more positions than are kept, those at the edge of as many as there are. A blend's are the live ones."""
    parts = Parts(replace(FLOWS["Flux"], latent=(1, 16, 10, 8)))
    trajectory = invert(parts.model, Guidance(parts.source), parts.image, parts.sigmas)
    whole, plans = record_attention(parts.model, trajectory, recording()), []
    assert [maps.shape for maps in whole.maps] == [(STEPS, 1, 5, 4, 4)]
    monkeypatch.setattr(record, "JOINT_POSITIONS", 7)
    store = record_attention(parts.model, trajectory, recording(), plans.append)
    assert [maps.shape for maps in store.maps] == [(STEPS, 1, 3, 2, 4)]
    for i, j, height, width in ((0, 0, 2, 2), (1, 1, 2, 2), (2, 0, 1, 2)):
        expected = whole.maps[0][:, :, 2 * i : 2 * i + height, 2 * j : 2 * j + width].mean((2, 3))
        torch.testing.assert_close(store.maps[0][:, :, i, j], expected)
    assert plans[0].maps == store.maps[0].nbytes
    edit = windowed(published("replace", STEPS, 4, 6), 0, STEPS)
    rule = ours([edit], STEPS, parts.target[0][0], 4, NEVER, side=math.inf)
    results = []
    for each in (None, store):
        edited_ = attach(parts.model, trajectory, rule, each)
        blended = attach_blend(edited_, trajectory, Shown(phrases(4, 1), phrases(6, 2)))
        result, count = rows(blended, trajectory, guidance_of(parts))
        assert sum(count) == 3 * STEPS
        results.append(result)
    assert torch.equal(*results)
    assert "lacks 5 of 5 steps, which ran with the source's row: it holds no word maps of the size" in caplog.text


# --- edits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [*(("Flux", kind) for kind in KINDS), *((name, "reweight o refine") for name in WORDED[1:])]
)
def test_prompt_to_prompt_from_a_store(name: str, kind: str) -> None:
    """Prompts of 4 and 6 tokens, which in Lumina 2 and Z-Image move the image."""
    parts, trajectory = setting(FLOWS[name])
    source = 6 if kind == "reweight" else 4
    if source == 6:
        parts.source = FLOWS[name].prompt(1, 6)
        trajectory = invert(parts.model, Guidance(parts.source), parts.image, parts.sigmas)
    store = record_attention(parts.model, trajectory, recording(Window(0, 0.8), Window(0, 0.4)))
    edit = windowed(published(kind, STEPS, source, 6), 0, 4)
    rule = ours([edit], STEPS, parts.target[0][0], source, Window(0, 0.4), side=math.inf)
    live, live_rows = rows(attach(parts.model, trajectory, rule), trajectory, guidance_of(parts))
    model = attach(parts.model, trajectory, rule, store)
    stored, stored_rows = rows(model, trajectory, guidance_of(parts))
    assert (sum(live_rows), sum(stored_rows)) == (2 * STEPS + 4, 2 * STEPS)
    assert close(stored, live, 1e-5)
    assert not close(stored, resample(parts.model, trajectory, guidance_of(parts)), 1e-3)
    assert torch.equal(resample(model, trajectory, guidance_of(parts)), stored)


@every_flow
@pytest.mark.parametrize("node", [PnPFeatureInjector, MasaCtrlNode])
def test_reads_of_the_image_from_a_store(flow: Flow, node: type) -> None:
    parts, trajectory = setting(flow)
    if node is MasaCtrlNode:
        widgets, reads = {"start": 0.0, "first_layer": 1}, ("key", "value")
    else:
        widgets, reads = {"tau_a": 1.0}, ("query", "key")
    store = record_attention(parts.model, trajectory, recording(NEVER, reads=reads))
    given = {"model": parts.model, "trajectory": trajectory, **widgets}
    (live,), (model,) = execute(node, **given), execute(node, **given, attention_store=store)
    guidance = guidance_of(parts)
    (live, live_rows), (stored, stored_rows) = (rows(each, trajectory, guidance) for each in (live, model))
    assert (sum(live_rows), sum(stored_rows)) == (3 * STEPS, 2 * STEPS)
    assert close(stored, live, 1e-5)
    assert not close(stored, resample(parts.model, trajectory, guidance), 1e-3)


def test_two_edits_share_a_store() -> None:
    """Words by one node, the image's content by the other."""
    parts, trajectory = setting(FLOWS["Flux"])
    edit = windowed(published("replace", STEPS, 4, 6), 0, STEPS)
    store = record_attention(parts.model, trajectory, recording(reads=EVERYTHING))
    results = []
    for each, expected in ((None, 3), (store, 2)):
        rule = ours([edit], STEPS, parts.target[0][0], 4, NEVER, side=math.inf)
        words = attach(parts.model, trajectory, rule, each)
        (both,) = execute(MasaCtrlNode, model=words, trajectory=trajectory, start=0.0, first_layer=0)
        result, count = rows(both, trajectory, guidance_of(parts))
        assert sum(count) == expected * STEPS
        results.append(result)
    assert close(*results, 1e-5)


def test_targets_and_images_with_a_store() -> None:
    """Two targets of one image, and two images with a target each."""
    flow = FLOWS["Flux"]
    for images in (1, 2):
        parts = Parts(flow)
        image = torch.randn(images, *flow.latent[1:], generator=torch.Generator().manual_seed(4))
        trajectory = invert(parts.model, Guidance(parts.source), image, parts.sigmas)
        targets = [parts.target[0], flow.prompt(8, 6)[0]]
        embedding = torch.cat([each for each, _ in targets])
        target = [[embedding, {"pooled_output": torch.cat([values["pooled_output"] for _, values in targets])}]]
        edits = [published("reweight o refine", STEPS, 4, 6, seed=seed) for seed in (5, 6)]
        rule = ours(edits, STEPS, embedding, 4, Window(0, 0.4), side=math.inf)
        guidance = Guidance(target, parts.negative, CFG)
        store = record_attention(parts.model, trajectory, recording())
        live, live_rows = rows(attach(parts.model, trajectory, rule), trajectory, guidance)
        stored, stored_rows = rows(attach(parts.model, trajectory, rule, store), trajectory, guidance)
        assert (sum(live_rows), sum(stored_rows)) == ((4 + images) * STEPS, 4 * STEPS)
        assert close(stored, live, 1e-5)


def test_windows_that_are_empty_change_no_bit() -> None:
    for name in ("Flux", "SD3", "Qwen-Image"):
        parts, trajectory = setting(FLOWS[name])
        store = record_attention(parts.model, trajectory, recording())
        edit = windowed(published("reweight o refine", STEPS, 4, 6), 0, 0)
        model = attach(parts.model, trajectory, ours([edit], STEPS, parts.target[0][0], 4, NEVER, side=math.inf), store)
        result, count = rows(model, trajectory, guidance_of(parts))
        assert torch.equal(result, resample(parts.model, trajectory, guidance_of(parts)))
        assert sum(count) == 2 * STEPS


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
def test_stores_of_half_precision(dtype: torch.dtype, apart: float) -> None:
    parts, trajectory = setting(FLOWS["Z-Image"])
    whole, half = (record_attention(parts.model, trajectory, recording(dtype=d)) for d in (torch.float32, dtype))
    assert 2 * half.bytes == whole.bytes
    edit = published("reweight o refine", STEPS, 4, 6)
    rule = ours([edit], STEPS, parts.target[0][0], 4, ALWAYS, side=math.inf)
    live = resample(attach(parts.model, trajectory, rule), trajectory, guidance_of(parts))
    assert close(resample(attach(parts.model, trajectory, rule, half), trajectory, guidance_of(parts)), live, apart)


def test_what_is_not_recorded_runs_live(caplog: pytest.LogCaptureFixture) -> None:
    parts, trajectory = setting(FLOWS["Flux"])
    model = parts.model
    blocks = dit_blocks(model.model.diffusion_model)
    layers = frozenset((block, 0) for block in blocks[2:])
    edit = windowed(published("replace", STEPS, 4, 6), 0, 4)
    rule = ours([edit], STEPS, parts.target[0][0], 4, Window(0, 0.4), side=math.inf)
    pnp = {"model": model, "trajectory": trajectory, "tau_a": 1.0, "attention_blocks": "single 0-2"}
    live = resample(attach(model, trajectory, rule), trajectory, guidance_of(parts))
    for changes, count in (
        ({}, 0),
        ({"cross": Window(0, 0.6)}, 1),
        ({"self_": NEVER}, 2),
        ({"reads": ("value",)}, 2),
        ({"layers": layers}, 4),
        ({"cross": NEVER}, 4),
    ):
        store = record_attention(model, trajectory, recording(**changes))
        caplog.clear()
        result, made = rows(attach(model, trajectory, rule, store), trajectory, guidance_of(parts))
        assert sum(made) == 2 * STEPS + count
        assert (f"the attention store lacks {count} of 5 steps" in caplog.text) == bool(count)
        assert close(result, live, 1e-5)
    store = record_attention(model, trajectory, recording(NEVER, layers=layers))
    (few,) = execute(PnPFeatureInjector, **pnp, attention_store=store)
    assert sum(rows(few, trajectory, guidance_of(parts))[1]) == 2 * STEPS
    (all_,) = execute(PnPFeatureInjector, **pnp | {"attention_blocks": ""}, attention_store=store)
    assert sum(rows(all_, trajectory, guidance_of(parts))[1]) == 3 * STEPS


# --- bytes -----------------------------------------------------------------------------------------------------------


@every_flow
@pytest.mark.parametrize("reads", [("query", "key"), ("key", "value"), EVERYTHING])
def test_bytes_are_told_before_the_first_call(flow: Flow, reads: tuple[str, ...]) -> None:
    parts, trajectory = setting(flow)
    model, cost = metered(parts.model)
    told: list[tuple[Plan, int]] = []
    asked = recording(Window(0, 0.8), Window(0.2, 0.6), reads=reads, dtype=torch.float16)
    store = record_attention(model, trajectory, asked, lambda plan: told.append((plan, len(cost.rows))))
    ((plan, calls),) = told
    assert calls == 0
    assert cost.rows == [1] * STEPS
    assert plan.inputs == store.bytes > 0
    assert plan.maps == sum(maps.nbytes for maps in store.maps)
    assert plan.steps == tuple(i for i, step in enumerate(store.inputs) if any(t is not None for t in step))
    assert bool(store.maps) == (flow.name in [*WORDED, "Flux dev"])


def test_bytes_are_tokens_by_channels_by_blocks() -> None:
    """Flux: 16 positions and 4 words of 32 channels, 5 blocks; queries in 4 steps, keys in 2, words' keys in 4."""
    parts, trajectory = setting(FLOWS["Flux"])
    store = record_attention(parts.model, trajectory, recording(Window(0, 0.8), Window(0, 0.4)))
    assert store.bytes == 4 * 32 * 5 * (4 * 16 + 2 * 16 + 4 * 4)
    (maps,) = store.maps
    assert maps.nbytes == 4 * STEPS * 16 * 4


STEP = 4 * 32 * 5 * (16 + 4)  # of queries and words' keys
FULL = STEP + 4 * 32 * 5 * 16  # and with the image's keys


@pytest.mark.parametrize(
    ("budget", "steps"),
    [(STEP - 1, []), (STEP, [2]), (2 * STEP, [2, 3]), (2 * STEP + FULL - 1, [2, 3]), (2 * STEP + FULL, [0, 2, 3])],
)
def test_budgets_keep_whole_steps(budget: int, steps: list[int]) -> None:
    """The cheapest first: those without the image's keys."""
    parts, trajectory = setting(FLOWS["Flux"])
    plans: list[Plan] = []
    asked = recording(Window(0, 0.8), Window(0, 0.4), budget=budget)
    store = record_attention(parts.model, trajectory, asked, plans.append)
    assert plans[0][:3] == (tuple(steps), 4, store.bytes)
    assert store.bytes <= budget
    edit = windowed(published("replace", STEPS, 4, 6), 0, 4)
    rule = ours([edit], STEPS, parts.target[0][0], 4, Window(0, 0.4), side=math.inf)
    live = resample(attach(parts.model, trajectory, rule), trajectory, guidance_of(parts))
    result, count = rows(attach(parts.model, trajectory, rule, store), trajectory, guidance_of(parts))
    assert sum(count) == 2 * STEPS + 4 - len(steps)
    assert close(result, live, 1e-5)


# --- files, and what is left as it was -------------------------------------------------------------------------------


def test_recording_leaves_everything_as_it_was() -> None:
    for name in ("Flux", "SD3.5 medium", "Wan"):
        parts, trajectory = setting(FLOWS[name])
        before = resample(parts.model, trajectory, guidance_of(parts))
        states = trajectory.states.clone()
        first, again = (record_attention(parts.model, trajectory, recording(reads=EVERYTHING)) for _ in range(2))
        assert same(first, again)
        assert torch.equal(trajectory.states, states)
        assert torch.equal(resample(parts.model, trajectory, guidance_of(parts)), before)
        assert not any(module._forward_pre_hooks for module in parts.model.model.diffusion_model.modules())
        assert "optimized_attention_override" not in parts.model.model_options["transformer_options"]


def test_another_packs_attention_is_called_beneath() -> None:
    parts, trajectory = setting(FLOWS["Flux"])
    calls: list[int] = []
    other = parts.model.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *args, **kwargs: (
        calls.append(1) or func(*args, **kwargs)
    )
    assert same(*(record_attention(model, trajectory, recording()) for model in (other, parts.model)))
    assert calls


@pytest.mark.parametrize("name", ["Flux", "Z-Image", "Wan"])
def test_save_and_load(name: str, tmp_path: Path) -> None:
    parts, trajectory = setting(FLOWS[name])
    store = record_attention(parts.model, trajectory, recording(NEVER, reads=("key", "value"), dtype=torch.bfloat16))
    store.save(tmp_path / "x.safetensors")
    loaded = AttentionStore.load(tmp_path / "x.safetensors")
    assert same(loaded, store)
    assert (loaded.fields, loaded.before) == (store.fields, store.before)
    results = []
    for each in (store, loaded):
        given = {"model": parts.model, "trajectory": each.trajectory, "start": 0.0, "attention_store": each}
        (edited_,) = execute(MasaCtrlNode, **given)
        result, count = rows(edited_, each.trajectory, guidance_of(parts))
        assert sum(count) == 2 * STEPS
        results.append(result)
    assert torch.equal(*results)


def test_damaged_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    parts, trajectory = setting(FLOWS["Flux"])
    record_attention(parts.model, trajectory, recording()).save(path)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for fields in ('["query"]', metadata["fields"].replace("query", "question")):
        save_file(tensors, path, metadata | {"fields": fields})
        with pytest.raises(ValueError, match="is a damaged attention store: its fields do not fit its layers"):
            AttentionStore.load(path)


def test_refusals() -> None:
    parts, trajectory = setting(FLOWS["Flux"])
    inputs = {"model": parts.model, "trajectory": trajectory}
    with pytest.raises(ValueError, match="given a MODEL that is already edited"):
        execute(RecordAttention, **inputs | {"model": execute(MasaCtrlNode, **inputs)[0]})
    with pytest.raises(ValueError, match="made with another model"):
        execute(RecordAttention, **inputs | {"model": FLOWS["SD3"].make()})
    with pytest.raises(ValueError, match="blocks of Record Attention has 'block 3', but the blocks to choose from are"):
        execute(RecordAttention, **inputs, blocks="block 3")
    with pytest.raises(ValueError, match="blocks of Record Attention is vital, which is known of Flux.1's blocks"):
        execute(RecordAttention, **inputs, blocks="vital")
    (store,) = execute(RecordAttention, **inputs)
    with pytest.raises(ValueError, match="is no UNet, but Feature Viewer reads"):
        execute(FeatureViewer, model=parts.model, attention_store=store)
    network = parts.model.model.diffusion_model
    kind = network.__class__
    network.__class__ = type("Replaced", (kind,), {})
    with pytest.raises(
        ValueError, match=r"This MODEL \(Replaced\) .* flow models whose attention Record Attention can"
    ):
        execute(RecordAttention, **inputs)
    wan, wan_trajectory = setting(FLOWS["Wan"])
    (store,) = execute(RecordAttention, model=wan.model, trajectory=wan_trajectory, self_replace=0.0)
    assert store.bytes == 0  # queries are kept for words alone, of which this model's attention has none
    with pytest.raises(ValueError, match="The attention store of this WAN21 holds no maps of words: Record"):
        word_heat(store, torch.ones(4, 1), (4, 4), 0.0, 1.0, all_sizes=False)


def test_the_node_keeps_what_its_widgets_say() -> None:
    parts, trajectory = setting(FLOWS["Flux"])
    output = run(RecordAttention, model=parts.model, trajectory=trajectory, dtype="fp32")
    assert "4 of 4 edited steps recorded, 0.1 MB, and 0.0 MB of word maps." in output.ui.as_dict()["text"][0]
    widgets = {"blocks": "single 1-2", "reads": "queries, keys, values", "cross_replace": 0.0, "self_replace": 0.2}
    (store,) = execute(RecordAttention, model=parts.model, trajectory=trajectory, **widgets)
    assert store.bytes == 2 * 32 * 16 * 2 * 3
    held = {layer.block_id for layer, t in zip(store.layers, store.inputs[0], strict=True) if t is not None}
    assert held == {("single", 1), ("single", 2)}
