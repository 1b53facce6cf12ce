"""Prompt-to-Prompt against its published formulas, on explicit maps and through the host's UNet."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import comfy.ldm.modules.attention
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras.nodes_hypertile import HyperTile
from torch import Tensor

from palimpsest.attention.alignment import Carry
from palimpsest.attention.p2p import PromptToPrompt, Window
from palimpsest.host.branch.source import attach
from palimpsest.host.layer import Inputs, Layer, Read
from palimpsest.nodes.p2p import P2PAttentionController
from reference import classic_p2p
from test_alignment import edit_of
from test_source import Probe, split
from tiny import Tiny, conditioning, execute, rows_of, tiny_model

CROSS, SELF = Layer("cross", "middle", 0, 0, 4, 4), Layer("self", "middle", 0, 0, 4, 4)
KINDS = ["replace", "refine", "reweight", "reweight o replace", "reweight o refine"]
NEVER = Window(0, 0)


@dataclass
class Published:
    """One edit as the public code holds it: the tables of its controllers, and its schedule in steps."""

    matrix: Tensor | None  # M [source tokens, target tokens] of a replacement
    mapper: Tensor | None  # [target tokens] source tokens of a refinement, -1 for new ones
    equalizer: Tensor  # c [target tokens] of a re-weighting
    first: Tensor  # [target tokens] the step at which each token's replacement begins
    end: Tensor

    @property
    def tokens(self) -> int:
        return len(self.equalizer)

    def map(self, step: int, source: Tensor, own: Tensor) -> Tensor:
        """A* = alpha o X + (1 - alpha) o A_target, maps [..., tokens]."""
        if self.matrix is not None:
            x = source @ self.matrix
        elif self.mapper is not None:
            aligned = (self.mapper >= 0).double()
            x = source[..., self.mapper] * aligned + own * (1 - aligned)
        else:
            x = source
        x = self.equalizer * x
        alpha = torch.tensor([float(a <= step < b) for a, b in zip(self.first, self.end, strict=True)])
        return alpha.double() * x + (1 - alpha.double()) * own

    def carry(self, source: int) -> Carry:
        """What the alignment makes of it, [source, target tokens] and [target tokens]."""
        if self.matrix is not None:
            return Carry(self.matrix, torch.zeros(self.tokens).double())
        if self.mapper is None:
            return Carry(torch.eye(source).double(), torch.zeros(self.tokens).double())
        carried = torch.zeros(source, self.tokens).double()
        for j, w in enumerate(self.mapper.tolist()):
            if w >= 0:
                carried[w, j] = 1
        return Carry(carried, (self.mapper < 0).double())


def published(kind: str, steps: int, source: int = 77, target: int = 77, seed: int = 5) -> Published:
    """An edit of random tables, its gains from -1 to 3 and 0, its windows of all sorts."""
    generator = torch.Generator().manual_seed(seed)
    matrix = mapper = None
    equalizer = torch.ones(target).double()
    if "replace" in kind:
        matrix = torch.rand(source, target, generator=generator).double().softmax(-1)
    if "refine" in kind:
        mapper = torch.randint(source, (target,), generator=generator)
        mapper[torch.rand(target, generator=generator) < 0.3] = -1
    if "reweight" in kind:
        equalizer = torch.rand(target, generator=generator).double() * 4 - 1
        equalizer[::5] = 0
    first = torch.randint(steps, (target,), generator=generator)
    end = torch.randint(steps + 1, (target,), generator=generator)  # before `first` for some: never
    return Published(matrix, mapper, equalizer, first, end)


def windowed(edit: Published, first: int, end: int) -> Published:
    """One window for all tokens."""
    one = torch.ones(edit.tokens, dtype=torch.long)
    return Published(edit.matrix, edit.mapper, edit.equalizer, one * first, one * end)


def ours(
    edits: list[Published], steps: int, target: Tensor, source: int = 77, self_: Window = NEVER, side: int = 32
) -> PromptToPrompt:
    carries = [edit.carry(source) for edit in edits]
    return PromptToPrompt(
        Carry(torch.stack([carry.source for carry in carries]), torch.stack([carry.own for carry in carries])),
        target,
        torch.stack([edit.equalizer for edit in edits]),
        torch.stack([torch.stack([edit.first for edit in edits]), torch.stack([edit.end for edit in edits])]).double()
        / steps,
        self_,
        side**2,
    )


def softmax(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double().softmax(-1)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# --- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [(0, 50), (0, 40), (10, 45), (0, 0), None])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_the_published_formulas(kind: str, window: tuple[int, int] | None) -> None:
    """Every row of the table of W, for windows of all tokens and of each."""
    steps = 50
    edit = published(kind, steps)
    edit = edit if window is None else windowed(edit, *window)
    own_edit = ours([edit], steps, torch.zeros(1, 77, 4))
    source, own = softmax(4, 16, 77, seed=1), softmax(4, 16, 77, seed=2)
    for step in range(steps):
        expected = edit.map(step, source, own)
        of_source, of_own = own_edit.tables(step / steps)
        torch.testing.assert_close(source @ of_source[0] + own * of_own[0], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("gain", [5.0, 1.0, 0.0, -1.0])
def test_a_gain_weighs_the_replaced_map(gain: float) -> None:
    """As in "my fluffy doll": all tokens keep the source's map, and one is weighed."""
    edit = windowed(published("reweight", 10), 0, 8)
    edit.equalizer = torch.ones(77).double()
    edit.equalizer[3] = gain
    of_source, of_own = ours([edit], 10, torch.zeros(1, 77, 4)).tables(0.5)
    assert torch.equal(of_source[0], torch.diag(edit.equalizer))
    assert not of_own.any()


@pytest.mark.parametrize("steps", [1, 7, 30, 50])
def test_windows_count_whole_steps(steps: int) -> None:
    """[first, end) holds the same steps as fractions do, though these are rounded."""
    bounds = torch.arange(steps + 1)
    for first, end in ((bounds * 0, bounds), (bounds, bounds * 0 + steps)):
        edit = Published(None, None, torch.ones(steps + 1).double(), first, end)
        edit = ours([edit], steps, torch.zeros(1, steps + 1, 4), steps + 1)
        active = torch.stack([edit.alpha(step / steps)[0] for step in range(steps)])
        assert torch.equal(active.sum(0).long(), end - first)
    for end in range(steps + 1):
        assert sum(step / steps in Window(0, end / steps) for step in range(steps)) == end


def attention(query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.transpose(-1, -2)).softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_reads_sum_to_the_edited_attention(kind: str) -> None:
    """Also for four images with two targets in turn, and tokens of another number than the source's."""
    steps, generator = 10, torch.Generator().manual_seed(3)
    source_tokens = 77 if kind == "reweight" else 154
    edits = [published(kind, steps, source_tokens, seed=seed) for seed in (5, 6)]

    def rows(tokens: int) -> Inputs:
        return Inputs(*(torch.randn(4, n, 8, generator=generator).double() for n in (16, tokens, tokens)))

    source, target = rows(source_tokens), rows(77)
    maps = attention(source.query, source.key), attention(target.query, target.key)
    edit = ours(edits, steps, torch.zeros(2, 77, 4), source_tokens)
    for step in range(steps):
        rule = edit.at(step / steps)
        assert rule.wants(CROSS)
        assert not rule.wants(SELF)
        expected = torch.stack([edits[i % 2].map(step, maps[0][i], maps[1][i]) for i in range(4)])
        reads = rule.read(CROSS, source, target)
        output = sum(attention(*read.inputs[:2]) @ read.inputs.value for read in reads)
        torch.testing.assert_close(output, expected @ target.value, rtol=0, atol=1e-13)
        carried = sum(attention(*read.inputs[:2]) @ read.carry for read in reads)
        torch.testing.assert_close(carried, expected, rtol=0, atol=1e-14)


def test_a_map_that_is_all_the_sources_is_one_term() -> None:
    edit = ours([windowed(published("reweight o replace", 10), 0, 10)], 10, torch.zeros(1, 77, 4))
    rows = Inputs(*(torch.zeros(1, n, 8) for n in (16, 77, 77)))
    assert len(edit.at(0.0).read(CROSS, rows, rows)) == 1
    edit = ours([windowed(published("refine", 10), 0, 10)], 10, torch.zeros(1, 77, 4))
    assert len(edit.at(0.0).read(CROSS, rows, rows)) == 2


def test_the_layers_of_a_call_share_their_tables() -> None:
    """On a graphics card each would be a copy to it, in every layer; and whether they hold anything a wait for it."""
    edit = ours([published("refine", 10)], 10, torch.zeros(1, 77, 4))
    rule = edit.at(0.5)
    rows = [Inputs(*(torch.zeros(1, n, width) for n in (positions, 77, 77))) for positions, width in ((16, 8), (64, 4))]
    (one, own), (other, other_own) = (rule.read(CROSS, inputs, inputs) for inputs in rows)
    assert one.carry is other.carry
    assert own.carry is other_own.carry
    assert one.carries == (True,)
    longer = Inputs(*(torch.zeros(1, n, 8) for n in (16, 60, 77)))
    assert rule.read(CROSS, longer, rows[0])[0].carry.shape == (1, 60, 77)


def test_nothing_is_read_outside_the_windows() -> None:
    edit = ours([windowed(published("refine", 10), 2, 6)], 10, torch.zeros(1, 77, 4), self_=Window(0.4, 0.8), side=4)
    wanted = [edit.at(step / 10) for step in range(10)]
    assert [rule is None for rule in wanted] == [True] * 2 + [False] * 6 + [True] * 2
    assert [rule.wants(CROSS) for rule in wanted[2:8]] == [True] * 4 + [False] * 2
    assert [rule.wants(SELF) for rule in wanted[2:8]] == [False] * 2 + [True] * 4
    larger = SELF._replace(height=8)
    assert not any(rule.wants(larger) for rule in wanted[2:8])


# --- through the UNet ------------------------------------------------------------------------------------------------


def edited(tiny: Tiny, edits: list[Published], self_: Window = NEVER):
    source, target = tiny.source[0][0].shape[1], tiny.target[0][0]
    return attach(tiny.model, tiny.trajectory, ours(edits, tiny.steps, target, source, self_))


def latent(tiny: Tiny, x: Tensor) -> Tensor:
    return tiny.model.model.process_latent_out(x)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_target_equals_the_classic_pair(tiny: Tiny, kind: str) -> None:
    """Windows and gains of each token its own."""
    edit = published(kind, 5)
    result = tiny.sample(edited(tiny, [edit], Window(0, 0.4)))
    expected = latent(tiny, classic_p2p(tiny, edit.map, 2, cfg=4.0))
    assert distance(result, expected) < 1e-4
    assert distance(tiny.sample(tiny.model), expected) > 1e-2  # the edit does something here


@pytest.mark.parametrize(
    ("source", "target", "negative", "no_memory"),
    [(77, 77, 154, False), (154, 77, 77, True), (77, 154, 77, False), (77, 154, 231, True)],
)
def test_unequal_token_counts(
    source: int, target: int, negative: int, no_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Tiny(source=conditioning(1, source), target=conditioning(2, target), negative=conditioning(3, negative))
    edit = published("reweight o refine", 5, source, target)
    if no_memory:
        split(monkeypatch, tiny)
    result = tiny.sample(edited(tiny, [edit]))
    assert distance(result, latent(tiny, classic_p2p(tiny, edit.map, 0, cfg=4.0))) < 1e-4


def test_without_guidance(tiny: Tiny) -> None:
    edit = published("reweight o refine", 5)
    result = tiny.sample(edited(tiny, [edit]), cfg=1.0)
    assert distance(result, latent(tiny, classic_p2p(tiny, edit.map, 0, cfg=1.0))) < 1e-4


def test_v_prediction() -> None:
    tiny = Tiny(model=tiny_model(ModelType.V_PREDICTION))
    edit = published("reweight o refine", 5)
    result = tiny.sample(edited(tiny, [edit], Window(0, 0.4)))
    assert distance(result, latent(tiny, classic_p2p(tiny, edit.map, 2, cfg=4.0))) < 1e-4


def of_image(tiny: Tiny, image: int, target: Tensor) -> Tiny:
    """The run of one image of the trajectory's, with its own target [1, tokens, channels]."""
    one = copy.copy(tiny)
    one.trajectory = tiny.trajectory._replace(states=tiny.trajectory.states[:, image : image + 1])
    one.noise, one.target = tiny.noise[image : image + 1], [[target, {}]]
    return one


TWO = [published("reweight o refine", 5, seed=5), published("reweight o replace", 5, seed=6)]


@pytest.mark.parametrize("no_memory", [False, True])
def test_two_images_each_with_its_target(no_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Tiny(batch=2, target=conditioning(2, batch=2))
    if no_memory:
        split(monkeypatch, tiny)
    both = tiny.sample(edited(tiny, TWO, Window(0, 0.4)))
    for i, edit in enumerate(TWO):
        one = of_image(tiny, i, tiny.target[0][0][i : i + 1])
        expected = classic_p2p(one, edit.map, 2, cfg=4.0)
        assert distance(both[i : i + 1], latent(tiny, expected)) < 1e-4


@pytest.mark.parametrize("no_memory", [False, True])
def test_targets_share_one_source_row(no_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Tiny(target=conditioning(2, batch=2))
    counted, rows = rows_of(edited(tiny, TWO, Window(0, 0.4)))
    if no_memory:
        split(monkeypatch, tiny)
    both = tiny.sample(counted, noise=tiny.noise.repeat(2, 1, 1, 1))
    assert rows == ([1, 2, 2] if no_memory else [1, 4]) * 5
    for i, edit in enumerate(TWO):
        one = of_image(tiny, 0, tiny.target[0][0][i : i + 1])
        assert distance(both[i : i + 1], tiny.sample(edited(one, [edit], Window(0, 0.4)), one.target)) < 1e-4


def test_images_take_the_targets_in_turn() -> None:
    tiny = Tiny(target=conditioning(2, batch=2))
    model = edited(tiny, TWO)
    two, four = (tiny.sample(model, noise=tiny.noise.repeat(n, 1, 1, 1)) for n in (2, 4))
    assert distance(four, two.repeat(2, 1, 1, 1)) < 1e-4


def test_rows_go_back_to_two_once_the_windows_end() -> None:
    tiny = Tiny(target=conditioning(2, batch=2))
    edits = [windowed(TWO[0], 0, 2), windowed(TWO[1], 1, 3)]
    counted, rows = rows_of(edited(tiny, edits))
    tiny.sample(counted, noise=tiny.noise.repeat(2, 1, 1, 1))
    assert rows == [1, 4, 1, 4, 1, 4, 4, 4]
    rows.clear()
    tiny.sample(counted, noise=tiny.noise.repeat(2, 1, 1, 1), cfg=1.0)
    assert rows == [1, 2, 1, 2, 1, 2, 2, 2]


def test_an_edit_needs_an_image_for_each_target() -> None:
    tiny = Tiny(target=conditioning(2, batch=2))
    with pytest.raises(ValueError, match="has 2 target prompts but the sampler's latent 1 image: put Repeat Latent"):
        tiny.sample(edited(tiny, TWO))
    with pytest.raises(ValueError, match="positive is not the target prompt of this edit"):
        tiny.sample(edited(tiny, TWO), conditioning(2), noise=tiny.noise.repeat(2, 1, 1, 1))


# --- two terms among other packs' patches ----------------------------------------------------------------------------


class Foreign:
    """Patches of another pack that know rows by cond_or_uncond alone, and change nothing."""

    def __init__(self, images: int = 1) -> None:
        self.images = images
        self.rows: list[int] = []

    def check(self, rows: Tensor, options: dict) -> None:
        assert len(rows) == len(options["cond_or_uncond"]) * self.images
        assert set(options["cond_or_uncond"]) <= {0, 1}
        self.rows.append(len(rows))

    def enter(self, n: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
        self.check(n, options)
        assert len(n) == len(context) == len(value)
        return n, context, value

    def leave(self, n: Tensor, options: dict) -> Tensor:
        self.check(n, options)
        return n

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        self.check(q, options)
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, options["n_heads"])


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("way", ["replace", "patch"])
def test_other_packs_see_a_term_as_one_more_row(way: str, images: int) -> None:
    tiny = Tiny(batch=images)
    edit = windowed(published("reweight o refine", 5), 0, 4)
    foreign = Foreign(images)
    plain, tiny.model = tiny.model, tiny.model.clone()
    if way == "replace":
        for block in (("input", 1), ("input", 3), ("middle", 0), *(("output", i) for i in range(4))):
            tiny.model.set_model_attn2_replace(foreign.attend, *block)
    else:
        tiny.model.set_model_attn2_patch(foreign.enter)
        tiny.model.set_model_attn2_output_patch(foreign.leave)
    result = tiny.sample(edited(tiny, [edit]))
    calls = 7 * (1 if way == "replace" else 2)
    assert foreign.rows == [4 * images] * (4 * calls) + [2 * images] * calls
    tiny.model = plain
    assert distance(result, tiny.sample(edited(tiny, [edit]))) < 1e-5


class Halves(Probe):
    """Attention as it is, in two terms."""

    def __init__(self, everyone: bool) -> None:
        super().__init__("self")
        self.everyone = everyone

    def read(self, layer: Layer, source: Inputs, target: Inputs) -> tuple[Read, ...]:
        return (Read(target._replace(value=target.value / 2)),) * 2


@pytest.mark.parametrize("everyone", [False, True])
def test_terms_of_self_attention_end_before_cross_attention(tiny: Tiny, everyone: bool) -> None:
    edit, foreign = windowed(published("reweight o refine", 5), 0, 4), Foreign()
    alone = tiny.sample(edited(tiny, [edit]))
    tiny.model = tiny.model.clone()
    tiny.model.set_model_attn1_patch(foreign.enter)
    tiny.model.set_model_attn2_patch(foreign.enter)
    both = tiny.sample(attach(edited(tiny, [edit]), tiny.trajectory, Halves(everyone)))
    assert distance(both, alone) < 1e-5
    of_self = 5 if everyone else 4
    assert foreign.rows == [of_self, 4] * (4 * 7) + [of_self, 3] * 7


def test_windows_that_end_before_they_start_are_refused(tiny: Tiny) -> None:
    """0 is off, whatever the start; a preset has its own."""
    edit = edit_of("a cat", ["a dog"], width=64)
    trajectory = tiny.trajectory._replace(conditioning=[[edit.embeddings[0], tiny.trajectory.conditioning[0][1]]])
    parts = {"model": tiny.model, "trajectory": trajectory, "prompt_edit": edit}
    for name in ("cross_replace", "self_replace"):
        empty = {name: 0.3, f"{name}_start": 0.3}
        sentence = (
            f"{name} of P2P Attention Controller is to end at 0.3 but starts at 0.3: raise {name}, or lower {name}_s"
        )
        with pytest.raises(ValueError, match=sentence):
            execute(P2PAttentionController, **parts, **empty)
        execute(P2PAttentionController, **parts, **empty | {name: 0.0})
        execute(P2PAttentionController, **parts, **empty, preset="paper")


def test_two_terms_under_hypertile(tiny: Tiny) -> None:
    """Two terms, the second of next to nothing, equal the one: also where self-attention is cut into tiles."""
    tiles, edit = [], windowed(published("reweight o replace", 5), 0, 5)

    def watch(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        tiles.append(len(q))
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, options["n_heads"])

    plain = tiny.sample(edited(tiny, [edit], Window(0, 0.4)))
    tiny.model = HyperTile.execute(tiny.model, 32, 1, 0, False)[0]
    tiny.model.set_model_attn1_replace(watch, "input", 1)
    one = tiny.sample(edited(tiny, [edit], Window(0, 0.4)))
    prompt_edit = ours([edit], 5, tiny.target[0][0], self_=Window(0, 0.4))
    prompt_edit.carry.own[0, 1] = 1e-9
    assert len(prompt_edit.at(0.0).read(CROSS, *[Inputs(*[torch.zeros(1, 77, 64)] * 3)] * 2)) == 2
    two = tiny.sample(attach(tiny.model, tiny.trajectory, prompt_edit))
    assert distance(two, one) < 1e-5
    assert distance(one, plain) > 1e-3  # HyperTile does something here
    assert set(tiles) == {3 * 4}
