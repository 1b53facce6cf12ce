"""Attention stores: what is recorded, edits that read it instead of the source's row, budgets, and files."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_execution.caching import CacheKeySetID, RAMPressureCache
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from palimpsest.attention.alignment import Carry
from palimpsest.attention.local_blend import LocalBlend
from palimpsest.attention.p2p import PromptToPrompt, Window
from palimpsest.attention.record import Plan, Recording, record_attention
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.host.files.store import AttentionStore
from palimpsest.host.files.trajectory import Trajectory
from palimpsest.host.layer import Layer
from palimpsest.inversion.run import Guidance, invert
from test_source import Probe, split
from tiny import Tiny, conditioning, execute, rows_of, tiny_model

CROSS, SELF, ALWAYS, NEVER = Window(0, 0.8), Window(0, 0.4), Window(0, 1), Window(0, 0)
WHOLE = 1 << 40


def recording(
    cross: Window = CROSS,
    self_: Window = SELF,
    budget: int = WHOLE,
    side: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Recording:
    return Recording(cross, self_, side**2, budget, dtype, torch.device("cpu"))


def recorded(tiny: Tiny, *args, **kwargs) -> AttentionStore:
    return record_attention(tiny.model, tiny.trajectory, recording(*args, **kwargs))


def edit_of(target: Tensor, cross: Window = CROSS, self_: Window = SELF, side: int = 32, source: int = 77):
    """A refinement with gains: of two terms wherever it acts."""
    k, n = target.shape[:2]
    generator = torch.Generator().manual_seed(8)
    carried = torch.zeros(k, source, n)
    carried[:, torch.randint(source, (n,), generator=generator), torch.arange(n)] = 1
    own = (torch.rand(k, n, generator=generator) < 0.4).float()
    gain = torch.rand(k, n, generator=generator) * 3
    windows = torch.stack([torch.full((k, n), cross.start), torch.full((k, n), cross.end)])
    return PromptToPrompt(Carry(carried * (1 - own[:, None]), own), target, gain, windows, self_, side**2)


def edited(tiny: Tiny, store: AttentionStore | None = None, **changes):
    source, target = tiny.source[0][0].shape[1], tiny.target[0][0]
    return attach(tiny.model, tiny.trajectory, edit_of(target, source=source, **changes), store)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# --- recording -------------------------------------------------------------------------------------------------------


def test_recording_runs_one_row_a_step_and_changes_nothing(tiny: Tiny) -> None:
    before = tiny.sample(tiny.model)
    counted, rows = rows_of(tiny.model)
    states = tiny.trajectory.states.clone()
    record_attention(counted, tiny.trajectory, recording())
    assert rows == [1] * 5
    assert torch.equal(tiny.sample(tiny.model), before)
    assert torch.equal(tiny.sample(counted), before)
    assert torch.equal(tiny.trajectory.states, states)


def test_an_interrupt_leaves_nothing_behind(tiny: Tiny) -> None:
    before, calls = tiny.sample(tiny.model), []

    def interrupt(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise comfy.model_management.InterruptProcessingException
        return executor(*args, **kwargs)

    broken = tiny.model.clone()
    broken.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.interrupt", interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        record_attention(broken, tiny.trajectory, recording())
    assert torch.equal(tiny.sample(tiny.model), before)
    again = record_attention(broken, tiny.trajectory, recording())
    assert same(again, recorded(tiny))


@pytest.mark.parametrize("source", [77, 154])
def test_a_store_holds_what_the_sources_row_supplies(source: int) -> None:
    tiny = Tiny(source=conditioning(1, source))
    store = recorded(tiny, ALWAYS, ALWAYS)
    assert len(store.layers) == len(set(store.layers)) == 14
    probe = Probe()
    tiny.sample(attach(tiny.model, tiny.trajectory, probe))
    by_step = [probe.seen[i : i + 14] for i in range(0, len(probe.seen), 14)]
    assert len(by_step) == 5
    for step, seen in enumerate(by_step):
        kept = store.at(step, list(store.layers))
        assert {layer for layer, _, _ in seen} == set(kept)
        for layer, live, _ in seen:
            for ours, theirs in zip(kept[layer], live, strict=True):
                assert ours.shape == theirs.shape
                assert distance(ours, theirs) < 1e-5


def test_a_store_holds_the_sources_maps(tiny: Tiny) -> None:
    """At every step and size, whatever the budget: each position's sum to 1, and a phrase's are the live ones."""
    store = recorded(tiny, budget=0)
    assert {maps.shape for maps in store.maps} == {(5, 1, 8, 8, 77), (5, 1, 4, 4, 77)}
    for maps in store.maps:
        torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
    columns = torch.zeros(1, 77, 2)
    columns[0, [2, 3], 0], columns[0, 5, 1] = 1, 1
    live = Sums((columns, columns))
    tiny.sample(attach_blend(tiny.model, tiny.trajectory, live))
    ours = torch.stack([store.word_maps(step, columns, (8, 8)) for step in range(5)]).cumsum(0)
    torch.testing.assert_close(ours, torch.stack(live.source), rtol=1e-4, atol=1e-6)
    assert store.word_maps(0, columns, (16, 16)) is None


class Sums:
    """A blend that confines nothing and keeps the source's maps that it is given."""

    layout = False

    def __init__(self, columns: tuple[Tensor, Tensor]) -> None:
        self.columns = columns
        self.source: list[Tensor] = []

    def check(self, positive: Tensor, batch: int) -> None:
        pass

    def applies(self, fraction: float) -> bool:
        return True

    def mask(self, source: Tensor, target: Tensor, size: tuple[int, int]) -> Tensor:
        self.source.append(source)
        return torch.ones(1, 1, *size)


def test_windows_and_sizes_are_those_asked_for(tiny: Tiny) -> None:
    store = recorded(tiny, Window(0.2, 0.8), Window(0.4, 1), side=4)
    for step, inputs in enumerate(store.inputs):
        for layer, held in zip(store.layers, inputs, strict=True):
            wanted = 1 <= step < 4 if layer.kind == "cross" else step >= 2 and layer.positions == 16
            assert (held is not None) == wanted
    assert store.bytes == sum(
        4 * layer.positions * (32 if layer.positions == 64 else 64) * 3  # steps of either kind
        for layer in store.layers
        if layer.kind == "cross" or layer.positions == 16
    )


def test_edited_models_and_other_models_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="given a MODEL that is already edited"):
        record_attention(edited(tiny), tiny.trajectory, recording())
    with pytest.raises(ValueError, match="made with another model"):
        record_attention(tiny_model(seed=9), tiny.trajectory, recording())
    combined = tiny.trajectory._replace(conditioning=[*tiny.source, *tiny.source])
    with pytest.raises(ValueError, match="has 2 entries"):
        record_attention(tiny.model, combined, recording())


# --- edits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target", "negative"), [(77, 77, 77), (77, 154, 231), (154, 77, 77)])
def test_an_edit_with_a_store_equals_the_live_one(source: int, target: int, negative: int) -> None:
    tiny = Tiny(source=conditioning(1, source), target=conditioning(2, target), negative=conditioning(3, negative))
    live = tiny.sample(edited(tiny))
    model, rows = rows_of(edited(tiny, recorded(tiny)))
    stored = tiny.sample(model)
    assert rows == [2] * 5
    assert distance(stored, live) < 1e-5
    assert distance(tiny.sample(tiny.model), live) > 1e-2


def test_rows_with_a_store(tiny: Tiny) -> None:
    counted, rows = rows_of(tiny.model)
    tiny.model = counted
    swap = edit_of(tiny.target[0][0])
    swap = PromptToPrompt(Carry(swap.carry.source, torch.zeros(1, 77)), swap.target, swap.gain, swap.cross, SELF, 32**2)
    store = recorded(tiny)
    for each, cfg, expected in ((None, 4.0, [3] * 4 + [2]), (store, 4.0, [2] * 5), (store, 1.0, [1] * 5)):
        model = attach(counted, tiny.trajectory, swap, each)
        rows.clear()
        tiny.sample(model, cfg=cfg)
        assert rows == expected


def test_an_edit_of_k_targets_and_a_store() -> None:
    tiny = Tiny(target=conditioning(2, batch=2))
    live = tiny.sample(edited(tiny), noise=tiny.noise.repeat(2, 1, 1, 1))
    model, rows = rows_of(edited(tiny, recorded(tiny)))
    assert distance(tiny.sample(model, noise=tiny.noise.repeat(2, 1, 1, 1)), live) < 1e-5
    assert rows == [4] * 5


def test_a_store_of_two_images() -> None:
    tiny = Tiny(batch=2, target=conditioning(2, batch=2))
    store = recorded(tiny)
    live = tiny.sample(edited(tiny))
    model, rows = rows_of(edited(tiny, store))
    both = tiny.sample(model)
    assert rows == [4] * 5
    assert distance(both, live) < 1e-5
    assert store.bytes == 2 * recorded(Tiny()).bytes
    one = copy.copy(tiny)
    one.trajectory = tiny.trajectory._replace(states=tiny.trajectory.states[:, 1:])
    one.noise, one.target = tiny.noise[1:], [[tiny.target[0][0][1:], {}]]
    single = recorded(one)
    for ours, theirs in zip(single.inputs[0], store.inputs[0], strict=True):
        assert distance(ours, theirs[1:]) < 1e-5


def test_split_calls_with_a_store(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = rows_of(edited(tiny, recorded(tiny)))
    together = tiny.sample(model)
    rows.clear()
    split(monkeypatch, tiny)
    assert distance(tiny.sample(model), together) < 1e-4
    assert rows == [1] * 10


def test_bytes_are_told_after_the_first_step(tiny: Tiny) -> None:
    counted, rows = rows_of(tiny.model)
    for changes in ({}, {"dtype": torch.float16}, {"side": 4}, {"budget": 3 * STEP}):
        told: list[tuple[Plan, int]] = []
        rows.clear()
        asked = recording(**changes)
        store = record_attention(
            counted, tiny.trajectory, asked, lambda plan, told=told: told.append((plan, len(rows)))
        )
        ((plan, calls),) = told
        assert calls == 1
        assert (plan.inputs, plan.maps) == (store.bytes, sum(maps.nbytes for maps in store.maps))
        assert plan.steps == tuple(i for i, step in enumerate(store.inputs) if any(t is not None for t in step))
        assert plan.wanted == 4


def test_blocks_are_those_asked_for(tiny: Tiny) -> None:
    blocks = {("input", 3), ("output", 1)}
    asked = Recording(**vars(recording()) | {"layers": frozenset((block, 0) for block in blocks)})
    store = record_attention(tiny.model, tiny.trajectory, asked)
    held = {layer.block_id for layer, t in zip(store.layers, store.inputs[0], strict=True) if t is not None}
    assert held == blocks
    assert len(store.maps) == 2  # of all blocks, as ever


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_stores_of_half_precision(tiny: Tiny, dtype: torch.dtype, apart: float) -> None:
    """Half the bytes; the edit differs by what they round."""
    store = recorded(tiny, dtype=dtype)
    assert store.bytes * 2 == recorded(tiny).bytes
    assert distance(tiny.sample(edited(tiny, store)), tiny.sample(edited(tiny))) < apart


STEP = 3 * 64 * 32 * 4 + 4 * 16 * 64 * 4  # bytes of a step's layers of one kind


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        (STEP - 1, []),
        (STEP, [2]),  # the cheapest first: without self-attention
        (2 * STEP, [2, 3]),
        (4 * STEP - 1, [2, 3]),
        (4 * STEP, [0, 2, 3]),
    ],
)
def test_budgets_keep_whole_steps(tiny: Tiny, budget: int, steps: list[int]) -> None:
    store = recorded(tiny, budget=budget)
    assert store.bytes <= budget
    assert store.bytes == sum(STEP * (2 if step < 2 else 1) for step in steps)
    for step, inputs in enumerate(store.inputs):
        held = {layer.kind for layer, t in zip(store.layers, inputs, strict=True) if t is not None}
        assert held == (({"self", "cross"} if step < 2 else {"cross"}) if step in steps else set())
    model, rows = rows_of(edited(tiny, store))
    result = tiny.sample(model)
    assert rows == [2 if step in steps else 3 for step in range(4)] + [2]
    assert distance(result, tiny.sample(edited(tiny))) < 1e-5


def test_an_edit_that_wants_more_runs_live_and_says_so(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    live = tiny.sample(edited(tiny))
    for store, expected in (
        (recorded(tiny, side=4), [3, 3, 2, 2, 2]),
        (recorded(tiny, self_=NEVER), [3, 3, 2, 2, 2]),
        (recorded(tiny, cross=Window(0, 0.6)), [2, 2, 2, 3, 2]),
        (recorded(tiny, cross=NEVER), [3, 3, 3, 3, 2]),
        (recorded(tiny, cross=ALWAYS, self_=ALWAYS), [2] * 5),
    ):
        model, rows = rows_of(edited(tiny, store))
        caplog.clear()
        assert distance(tiny.sample(model), live) < 1e-5
        assert rows == expected
        lacking = expected.count(3)
        assert (f"the attention store lacks {lacking} of 5 steps" in caplog.text) == bool(lacking)


def blend_of(tiny: Tiny) -> LocalBlend:
    columns = [torch.zeros(len(tiny.target[0][0]), prompt[0][0].shape[1], 2) for prompt in (tiny.source, tiny.target)]
    for table in columns:
        table[:, [2, 3], 0] = table[:, 4, 1] = 1
    return LocalBlend(tuple(columns), 1, tiny.target[0][0], 0.8, 0.9, 0.2, 0, None, False)


@pytest.mark.parametrize(("source", "target"), [(77, 77), (154, 77), (77, 154)])
def test_local_blend_takes_the_stores_word_maps(source: int, target: int) -> None:
    tiny = Tiny(source=conditioning(1, source), target=conditioning(2, target))
    store = recorded(tiny)
    live = tiny.sample(attach_blend(edited(tiny), tiny.trajectory, blend_of(tiny)))
    model, rows = rows_of(attach_blend(edited(tiny, store), tiny.trajectory, blend_of(tiny)))
    assert distance(tiny.sample(model), live) < 1e-5
    assert rows == [2] * 5
    unblended = tiny.sample(edited(tiny))
    assert distance(unblended, live) > 1e-2
    same_pixels = (live == tiny.model.model.process_latent_out(tiny.trajectory.states[-1])).all(1)
    assert 0.1 < same_pixels.float().mean() < 0.9


def test_local_blend_of_k_targets_and_a_store() -> None:
    tiny = Tiny(target=conditioning(2, batch=2))
    blend = blend_of(tiny)
    blend.columns[1][1].copy_(blend.columns[1][0].roll(3, 0))
    noise = tiny.noise.repeat(2, 1, 1, 1)
    live = tiny.sample(attach_blend(edited(tiny), tiny.trajectory, blend), noise=noise)
    model, rows = rows_of(attach_blend(edited(tiny, recorded(tiny)), tiny.trajectory, blend))
    assert distance(tiny.sample(model, noise=noise), live) < 1e-5
    assert rows == [4] * 5


def test_local_blend_and_a_partial_store(tiny: Tiny) -> None:
    """The budget is for inputs: word maps are always held, so that only edited steps may need the source."""
    live = tiny.sample(attach_blend(edited(tiny), tiny.trajectory, blend_of(tiny)))
    model, rows = rows_of(attach_blend(edited(tiny, recorded(tiny, budget=STEP)), tiny.trajectory, blend_of(tiny)))
    assert distance(tiny.sample(model), live) < 1e-5
    assert rows == [3, 3, 2, 3, 2]


def test_requeueing_with_a_store_gives_the_same_bits(tiny: Tiny) -> None:
    store = recorded(tiny)
    before = [t.clone() for step in store.inputs for t in step if t is not None]
    model = attach_blend(edited(tiny, store), tiny.trajectory, blend_of(tiny))
    assert torch.equal(tiny.sample(model), tiny.sample(model))
    after = [t for step in store.inputs for t in step if t is not None]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_wrong_stores_are_refused(tiny: Tiny) -> None:
    store = recorded(tiny)
    other = copy.copy(tiny)
    other.trajectory = invert(tiny.model, Guidance(tiny.source, None, 1.0), tiny.image + 1, tiny.sigmas)
    with pytest.raises(ValueError, match="recorded from another trajectory: record it from this edit's"):
        edited(tiny, recorded(other))
    stranger = Tiny(model=tiny_model(seed=9))
    with pytest.raises(ValueError, match="recorded from another trajectory"):
        edited(tiny, recorded(stranger))
    with pytest.raises(ValueError, match="made with another model"):
        attach(tiny.model, stranger.trajectory, edit_of(tiny.target[0][0]), recorded(stranger))
    shorter = Tiny(steps=4)
    with pytest.raises(ValueError, match="recorded from another trajectory"):
        edited(tiny, recorded(shorter))
    with pytest.raises(ValueError, match="read from different attention stores: connect the same one"):
        attach(edited(tiny, store), tiny.trajectory, Probe("self"), recorded(tiny))
    attach(edited(tiny, store), tiny.trajectory, Probe("self"), store)


def test_layers_that_change_their_size_are_refused(tiny: Tiny) -> None:
    """Deep Shrink: live it works, and a store too where it is on for the whole run."""

    def shrunk(model: ModelPatcher, end: float) -> ModelPatcher:
        return execute(PatchModelAddDownscale, model=model, block_number=1, end_percent=end)[0]

    part, whole = shrunk(tiny.model, 0.35), shrunk(tiny.model, 1.0)
    with pytest.raises(ValueError, match="changes input block 3 to 4 x 4 during the run.* without an attention store"):
        record_attention(part, tiny.trajectory, recording())
    store = recorded(tiny)
    for model in (shrunk(edited(tiny, store), 0.35), shrunk(edited(tiny, store), 1.0)):
        with pytest.raises(
            ValueError, match="store does not hold input block 3 at the 2 x 2 positions that it has her"
        ):
            tiny.sample(model)
    assert distance(tiny.sample(shrunk(edited(tiny), 0.35)), tiny.sample(part)) > 1e-3
    store = record_attention(whole, tiny.trajectory, recording())
    with pytest.raises(ValueError, match="store does not hold input block 3 at the 4 x 4 positions that it has here"):
        tiny.sample(edited(tiny, store))
    assert distance(tiny.sample(shrunk(edited(tiny, store), 1.0)), tiny.sample(shrunk(edited(tiny), 1.0))) < 1e-5


def test_two_edits_share_a_store(tiny: Tiny) -> None:
    """Also where only the first brings it."""
    store, counted = recorded(tiny, ALWAYS, ALWAYS), rows_of(tiny.model)
    tiny.model, rows = counted
    for second in (store, None):
        model = attach(edited(tiny, store, self_=NEVER), tiny.trajectory, Probe("self"), second)
        rows.clear()
        tiny.sample(model)
        assert rows == [2] * 5


# --- files and memory ------------------------------------------------------------------------------------------------


def same(one: AttentionStore, other: AttentionStore) -> bool:
    """Bit for bit, trajectories apart."""
    tensors = [[*(t for step in store.inputs for t in step), *store.maps] for store in (one, other)]
    pairs = zip(*tensors, strict=True)
    return one.layers == other.layers and all(
        a is b is None or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tiny: Tiny, tmp_path: Path, dtype: torch.dtype) -> None:
    store = recorded(tiny, budget=2 * STEP, dtype=dtype)
    store.save(tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    loaded = AttentionStore.load(tmp_path / "x.safetensors")
    assert same(loaded, store)
    assert all(isinstance(layer, Layer) for layer in loaded.layers)
    assert torch.equal(loaded.trajectory.states, tiny.trajectory.states)
    assert torch.equal(loaded.trajectory.conditioning[0][0], tiny.source[0][0])
    tiny.trajectory = loaded.trajectory
    assert torch.equal(tiny.sample(edited(tiny, loaded)), tiny.sample(edited(tiny, store)))


def test_damaged_files_are_refused_in_a_sentence(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    recorded(tiny).save(path)
    whole, tensors = path.read_bytes(), {k: v.clone() for k, v in load_file(path).items()}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            AttentionStore.load(path)

    path.write_bytes(whole[:-100])
    refused("'x.safetensors' is not a readable safetensors file")
    save_file(tensors, path)
    refused("'x.safetensors' is no attention store: choose a file written by Save Attention Store")
    tiny.trajectory.save(path)
    refused("is no attention store")
    save_file(tensors, path, {k: v for k, v in metadata.items() if k != "layers"})
    refused("'x.safetensors' is a damaged attention store: 'layers' is missing")
    for layers in ("[[1]]", "7", "not json"):
        save_file(tensors, path, metadata | {"layers": layers})
        refused("is a damaged attention store")
    save_file({k: v for k, v in tensors.items() if k != "maps.0"}, path, metadata)
    refused("damaged attention store: 'maps.0' is missing")
    save_file(tensors | {"maps.1": tensors["maps.1"][:-1].clone()}, path, metadata)
    refused("its maps do not fit its trajectory")
    save_file({k: v for k, v in tensors.items() if k != "sigmas"}, path, metadata)
    refused("damaged attention store: 'sigmas' is missing")
    save_file(tensors, path, {k: v for k, v in metadata.items() if k not in ("fields", "before")})
    assert same(AttentionStore.load(path), recorded(tiny))  # files of before there were these
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="is no trajectory"):
        Trajectory.load(path)
    assert same(AttentionStore.load(path), recorded(tiny))


def test_the_hosts_cache_weighs_all_of_it(tiny: Tiny) -> None:
    store = recorded(tiny)
    cache = RAMPressureCache(CacheKeySetID)
    cache.cache["node"] = SimpleNamespace(outputs=[[store]])
    cache.used_generation["node"], cache.timestamps["node"] = cache.generation - 1, 0
    freed = cache.ram_release(math.inf)
    assert not cache.cache
    tensors = [*store.maps, tiny.trajectory.states, tiny.trajectory.sigmas, tiny.source[0][0]]
    assert freed >= store.bytes + sum(t.nbytes for t in tensors)
