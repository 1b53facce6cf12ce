"""Word maps carried by self-attention: the maps against float64, and runs of Local Blend with them."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import replace

import comfy.ldm.modules.attention
import pytest
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from flows import FLOWS
from palimpsest.attention.masactrl import MasaCtrl
from palimpsest.attention.phrases import changed_columns
from palimpsest.host.branch.maps import WordMaps, layout_map
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.host.layer import Layer
from palimpsest.host.unet.tree import blocks_with
from palimpsest.nodes.blend import LocalBlendNode
from test_flow_reads import setting
from test_local_blend import TWO_TARGETS, Watch, blend, columns, distance, refine, sized
from test_phrases import edit_of
from test_source import split
from test_store import recorded
from tiny import Tiny, conditioning, execute, rows_of, tiny_model

THREE_LEVELS = {"num_res_blocks": [1, 1, 1], "channel_mult": [1, 2, 4]}
SD15 = THREE_LEVELS | {"transformer_depth": [1, 1, 1], "transformer_depth_output": [1] * 6}
SDXL = THREE_LEVELS | {
    "transformer_depth": [0, 1, 2],
    "transformer_depth_output": [0, 0, 1, 1, 2, 2],
    "transformer_depth_middle": 2,
    "use_linear_in_transformer": True,
    "num_heads": -1,
    "num_head_channels": 16,
}
SOURCE, TARGET = 2, 0  # the chunks of a call
THRESHOLD = 0.9995  # for maps of random weights, which are almost even
Seen = dict[tuple[str, int], list[tuple[Tensor, Tensor, int]]]


def tapped(model: ModelPatcher, size: tuple[int, int]) -> tuple[ModelPatcher, Seen]:
    """A clone of `model`, and the queries, keys and heads of its layers of a size, by their kind and the chunk."""
    seen: Seen = defaultdict(list)

    def attend(kind: str):
        def attention(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
            heads = options["n_heads"]
            if tuple(options["activations_shape"][2:]) == size:
                chunks = options["palimpsest.chunks"]
                for chunk, query, key in zip(chunks, q.chunk(len(chunks)), k.chunk(len(chunks)), strict=True):
                    seen[kind, chunk].append((query, key, heads))
            return comfy.ldm.modules.attention.optimized_attention(q, k, v, heads)

        return attention

    model = model.clone()
    for place in blocks_with(model.model.diffusion_model, SpatialTransformer):
        model.set_model_attn1_replace(attend("self"), *place)
        model.set_model_attn2_replace(attend("cross"), *place)
    return model, seen


def plain_map(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """[b, positions, tokens] in float64."""
    query, key = (t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key))
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1).mean(1)


def plain_means(seen: Seen, chunk: int, table: Tensor, size: tuple[int, int]) -> Tensor:
    """mean(S) @ mean(A) of the phrases of `table` [b, tokens, m], as [b, m, h, w]; copies of a token are added."""
    crossing = [plain_map(*layer).unflatten(-1, (-1, table.shape[1])).sum(-2) for layer in seen["cross", chunk]]
    own = [plain_map(*layer) for layer in seen["self", chunk]]
    carried = torch.stack(own).mean(0) @ torch.stack(crossing).mean(0) @ table.double()
    return carried.transpose(1, 2).unflatten(-1, size)


def test_a_layout_map_is_the_mean_over_heads() -> None:
    query, key = torch.randn(2, 3, 30, 32, generator=torch.Generator().manual_seed(1)) * 3
    maps = layout_map(query, key, 4)
    torch.testing.assert_close(maps.double(), plain_map(query, key, 4), rtol=1e-5, atol=1e-7)
    assert layout_map(query.half(), key.half(), 4).dtype == torch.float32


def test_means_are_carried() -> None:
    """The mean of the self-attention maps times the mean of the word maps, of each side its own."""
    generator = torch.Generator().manual_seed(1)
    columns_of = torch.ones(1, 5, 3), torch.ones(2, 5, 3)
    maps = WordMaps(columns_of, (4, 6), layout=True)
    sums: dict = defaultdict(list)
    for _ in range(3):
        for side, rows in (("source", 1), ("target", 2)):
            for kind, tokens in (("self", 24), ("cross", 3)):
                sums[side, kind].append(torch.rand(rows, 24, tokens, generator=generator))
                maps.add(side, sums[side, kind][-1], kind)
    for side, measured in zip(("source", "target"), maps.means(), strict=True):
        own, words = (torch.stack(sums[side, kind]).double().mean(0) for kind in ("self", "cross"))
        expected = torch.einsum("bij,bjm->bmi", own, words).unflatten(-1, (4, 6))
        torch.testing.assert_close(measured.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("unet", "latent", "layers", "source", "target", "no_memory"),
    [
        ({}, (8, 8), 3, 77, 77, False),
        ({}, (9, 7), 3, 77, 154, True),
        (SD15, (48, 48), 4, 154, 77, False),
        (SDXL, (48, 48), 8, 77, 77, False),
    ],
)
def test_maps_are_those_of_the_layers(
    unet: dict,
    latent: tuple[int, int],
    layers: int,
    source: int,
    target: int,
    no_memory: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the edited layers, as the word maps are."""
    tiny = sized(*latent, model=tiny_model(**unet), source=conditioning(1, source), target=conditioning(2, target))
    size = latent if latent[0] < 48 else (12, 12)
    tables = columns([[2, 3], [5]], source), columns([[4], [6, 7]], target)
    watch = Watch(tables, layout=True)
    model, seen = tapped(tiny.model, size)
    model = attach_blend(model, tiny.trajectory, watch)
    if no_memory:
        split(monkeypatch, tiny)
    tiny.sample(model, sigmas=tiny.sigmas[:2])
    for chunk, table, measured in zip((SOURCE, TARGET), tables, watch.seen[0], strict=True):
        assert len(seen["self", chunk]) == len(seen["cross", chunk]) == layers
        torch.testing.assert_close(measured.double(), plain_means(seen, chunk, table, size), rtol=1e-5, atol=1e-8)


def test_what_is_everywhere_stays(tiny: Tiny) -> None:
    """Self-attention adds up to 1: the whole of attention at each step remains 1."""
    table = columns([list(range(77))])
    watch = Watch((table, table), layout=True)
    tiny.sample(attach_blend(tiny.model, tiny.trajectory, watch))
    for step, pair in enumerate(watch.seen, 1):
        for maps in pair:
            torch.testing.assert_close(maps, torch.full((1, 1, 8, 8), float(step)))


def test_carried_maps_are_not_widened() -> None:
    maps = torch.zeros(1, 1, 8, 8)
    maps[..., 3, 3] = 1
    local = blend(phrases=([[2]], []))
    for layout, positions in ((False, 9), (True, 1)):
        assert replace(local, layout=layout).mask(maps, maps, (8, 8)).sum() == positions


def test_words_alone_measure_no_self_attention(tiny: Tiny) -> None:
    table = columns([[2, 3]])
    cross = Layer("cross", "output", 2, 0, 8, 8)
    for layout in (False, True):
        maps = WordMaps((table, table), (8, 8), layout)
        assert maps.measures(cross)
        assert maps.measures(cross._replace(kind="self")) == layout
        assert not maps.measures(cross._replace(kind="self", height=4))


def layout_blend(tiny: Tiny, **changes):
    return replace(blend(tiny, ([[2, 3]], []), THRESHOLD), layout=True, **changes)


def assert_rows(together: Watch, alone: Watch, row: int) -> None:
    """The maps themselves: what rounding makes of a position at the threshold is no matter of batches."""
    for both, one in zip(together.seen, alone.seen, strict=True):
        for maps, own in zip(both, one, strict=True):
            row_of = row if len(maps) > 1 else 0
            torch.testing.assert_close(maps[row_of : row_of + 1], own, rtol=1e-5, atol=0)


def test_the_node_is_either_bit_for_bit(tiny: Tiny) -> None:
    edit = edit_of("a cat on a mat", "a fluffy dog on a mat")
    model = attach(tiny.model, tiny.trajectory, refine(tiny.target[0][0])[0])
    over = {"model": model, "trajectory": tiny.trajectory, "prompt_edit": edit, "threshold": THRESHOLD}
    results = {}
    for mask_from, layout in (("words", False), ("words and layout", True)):
        (node,) = execute(LocalBlendNode, **over, mask_from=mask_from)
        pair = changed_columns(edit, joined=layout)
        local = replace(blend(tiny, threshold=THRESHOLD, start=0.2, soft=1), columns=pair, phrases=pair[0].shape[2])
        results[mask_from] = tiny.sample(node)
        assert torch.equal(
            results[mask_from], tiny.sample(attach_blend(model, tiny.trajectory, replace(local, layout=layout)))
        )
    assert torch.equal(results["words"], tiny.sample(execute(LocalBlendNode, **over)[0]))
    assert distance(*results.values()) > 1e-3


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_runs_repeat_and_split(tiny: Tiny, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(tiny.model, tiny.trajectory, refine(tiny.target[0][0])[0])
    blended = attach_blend(model, tiny.trajectory, layout_blend(tiny))
    first = tiny.sample(blended, sampler=sampler)
    assert torch.equal(tiny.sample(blended, sampler=sampler), first)
    source = tiny.model.model.process_latent_out(tiny.trajectory.states[-1])
    assert 0.1 < (first == source).all(1).float().mean() < 0.9
    together, apart = (Watch((columns([[2, 3]]), columns([[2, 3]])), layout=True) for _ in range(2))
    tiny.sample(attach_blend(model, tiny.trajectory, together), sampler=sampler)
    split(monkeypatch, tiny)
    tiny.sample(attach_blend(model, tiny.trajectory, apart), sampler=sampler)
    assert_rows(together, apart, 0)


def test_a_batch_of_targets_equals_single_runs() -> None:
    """One source's maps serve both."""
    tiny = Tiny(target=conditioning(2, batch=2))
    targets = tiny.target[0][0]
    both = tuple(torch.cat([columns(one), columns(other)]) for one, other in TWO_TARGETS)

    def watched(tables: tuple[Tensor, ...], target: Tensor) -> Watch:
        watch = Watch(tables, layout=True)
        model = attach_blend(attach(tiny.model, tiny.trajectory, refine(target)[0]), tiny.trajectory, watch)
        tiny.sample(model, [[target, {}]], noise=tiny.noise.repeat(len(target), 1, 1, 1))
        return watch

    together = watched(both, targets)
    for i in range(2):
        assert_rows(together, watched(tuple(table[i : i + 1] for table in both), targets[i : i + 1]), i)


def test_a_batch_of_images_equals_single_runs() -> None:
    tiny = Tiny(batch=2)
    table = columns([[2, 3]])

    def watched(rows: slice) -> Watch:
        watch = Watch((table, table), layout=True)
        trajectory = tiny.trajectory._replace(states=tiny.trajectory.states[:, rows])
        tiny.sample(attach_blend(tiny.model, trajectory, watch), noise=tiny.noise[rows])
        return watch

    together = watched(slice(None))
    assert all(len(maps) == 2 and distance(maps[0], maps[1]) > 1e-4 for pair in together.seen for maps in pair)
    for i in range(2):
        assert_rows(together, watched(slice(i, i + 1)), i)


def test_a_store_holds_no_self_attention(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    """The source's row runs, so that the result is the same, and the log says how to spare it."""
    store, edit = recorded(tiny), refine(tiny.target[0][0])[0]
    live = tiny.sample(attach_blend(attach(tiny.model, tiny.trajectory, edit), tiny.trajectory, layout_blend(tiny)))
    counted, rows = rows_of(tiny.model)
    model = attach_blend(attach(counted, tiny.trajectory, edit, store), tiny.trajectory, layout_blend(tiny))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(tiny.sample(model), live)
    assert rows == [3] * 5
    assert "holds no self-attention maps: set mask_from of Local Blend to words." in caplog.text


def masactrl(layers: set) -> MasaCtrl:
    return MasaCtrl(frozenset((place, 0) for place in layers), 0.0, True, None)


def test_layers_that_read_the_sources_keys_are_left_out(tiny: Tiny) -> None:
    """MasaCtrl looks there from one image to the other. Union tiles the keys of all other rows."""
    tables = columns([[2, 3]]), columns([[4]])
    watch = Watch(tables, layout=True)
    model, seen = tapped(tiny.model, (8, 8))
    model = attach_blend(attach(model, tiny.trajectory, masactrl({("output", 3)})), tiny.trajectory, watch)
    tiny.sample(model, sigmas=tiny.sigmas[:2])
    of_source, of_target = seen["self", SOURCE], seen["self", TARGET]
    assert [key.shape[1] for _, key, _ in of_target] == [64, 64, 128]
    seen["self", TARGET] = of_target[:2]
    seen["self", SOURCE] = [(query, key[:, :64], heads) for query, key, heads in of_source]
    for chunk, table, measured in zip((SOURCE, TARGET), tables, watch.seen[0], strict=True):
        torch.testing.assert_close(measured.double(), plain_means(seen, chunk, table, (8, 8)), rtol=1e-5, atol=1e-8)


def test_all_layers_reading_the_sources_keys_are_refused(tiny: Tiny) -> None:
    model = attach(tiny.model, tiny.trajectory, masactrl({("input", 1), ("output", 2), ("output", 3)}))
    model = attach_blend(model, tiny.trajectory, layout_blend(tiny))
    with pytest.raises(ValueError, match="'words and layout' finds no self-attention of 8 x 8 .* set mask_from to wo"):
        tiny.sample(model)


def test_flow_models_are_refused() -> None:
    """But for a mask alone, which needs no words."""
    parts, trajectory = setting(FLOWS["Flux"])
    with pytest.raises(
        ValueError, match=r"\(Flux\) is no UNet, and mask_from 'words and layout' .*: set mask_from to w"
    ):
        attach_blend(parts.model, trajectory, replace(blend(), layout=True))
    attach_blend(parts.model, trajectory, replace(blend(phrases=None, user=torch.ones(1, 8, 8)), layout=True))
