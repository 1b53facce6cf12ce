"""Prompt-to-Prompt in the joint attention of flow transformers: against explicit maps, and a plain loop of calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NamedTuple

import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import calc_cond_batch
from torch import Tensor, nn

from flows import FLOWS, Flow
from palimpsest.attention.alignment import PromptEdit, join
from palimpsest.attention.editing import prompt_to_prompt
from palimpsest.attention.p2p import Window
from palimpsest.host.branch.call import CHUNKS, Call
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.host.dit.architectures import turned
from palimpsest.host.dit.attention import Joint
from palimpsest.host.files.trajectory import Trajectory
from palimpsest.host.layer import Layer
from palimpsest.host.run.cost import metered
from palimpsest.host.run.sampler import OwnSampler, Run
from palimpsest.host.words import Words, words_between
from palimpsest.inversion.flow_edit import edit_trajectory
from palimpsest.inversion.run import Guidance, ddim_sigmas, invert, resample
from palimpsest.nodes.inject import MasaCtrlNode
from reference import explicit
from test_flow_edit import CFG, STEPS, Parts, close
from test_flow_reads import blocks_of
from test_p2p import KINDS, NEVER, Published, ours, published, windowed
from tiny import execute

WORDED = ["Flux", "Chroma", "SD3", "SD3.5 medium", "Qwen-Image", "Lumina2", "Z-Image"]
ALWAYS = Window(0, 1)
POSITIONS = 16  # of their images

# --- the formula -----------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Queries, keys and values [b, heads, tokens, d] of a prompt's row, of whose tokens the first are its words."""

    query: Tensor
    key: Tensor
    value: Tensor
    words: int
    image: slice


def edited_rows(edit: Published, step: int, self_: bool, source: Rows, own: Rows) -> tuple[Tensor, Tensor]:
    """What all tokens get, and the image's map of words [b, heads, positions, words].

    The other tokens see the keys that the image's have, and are as they were but for that.
    """
    active = (edit.first <= step) & (step < edit.end)
    cross, carried = bool(active.any()), bool((edit.carry(source.words).source * edit.equalizer * active).any())
    of_source = source.query[:, :, source.image]
    query = of_source if self_ else own.query[:, :, own.image]
    key, words = own.key.clone(), own.key[:, :, : own.words]
    if self_:
        key[:, :, own.image] = source.key[:, :, source.image]
    shared = source.key[:, :, : source.words] if self_ and carried else words
    whole = explicit(query, torch.cat([shared, key[:, :, own.words :]], 2))
    of_words, others = whole[..., : shared.shape[2]], whole[..., shared.shape[2] :]
    if cross:
        maps = (explicit(q, k) for q, k in ((of_source, source.key[:, :, : source.words]), (query, words)))
        of_words = of_words.sum(-1, keepdim=True) * edit.map(step, *(each.double() for each in maps)).to(whole)
    result = explicit(own.query, key) @ own.value
    result[:, :, own.image] = torch.cat([of_words, others], -1) @ own.value
    return result, of_words


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (explicit(query, key) @ value).transpose(1, 2).flatten(2)


def random_rows(generator: torch.Generator, words: int, padding: int, positions: int, others: int) -> Rows:
    tokens = words + padding + positions + others
    tensors = (torch.randn(2, 3, tokens, 4, generator=generator).double() for _ in range(3))
    return Rows(*tensors, words, slice(words + padding, words + padding + positions))


def through_call(rule, source: Rows, own: Rows, split: bool) -> Tensor:
    """What `Call.joint` makes of the source's call and then of the target's, [b, heads, tokens, d]."""
    model = FLOWS["SD3"].make().model.diffusion_model
    call = Call([rule], 0, None, 2, 0, [0, 2], (source.words, own.words), None)
    results = []
    for index, rows in ((2, source), (0, own)):
        joint = Joint(Layer("self", "block", 0, 0, 2, 3), rows.image, 3, split, False)
        tensors = rows[:3] if split else [t.transpose(1, 2).flatten(2) for t in rows[:3]]

        def any_layout(*tensors: Tensor) -> Tensor:
            return attend(*(t if split else t.unflatten(-1, (3, -1)).transpose(1, 2) for t in tensors))

        results.append(call.joint(model, joint, any_layout, tensors, {CHUNKS: [index]}))
    of_source, of_target = (result.unflatten(-1, (3, -1)).transpose(1, 2) for result in results)
    torch.testing.assert_close(of_source, explicit(*source[:2]) @ source.value, rtol=0, atol=1e-14)
    return of_target


@pytest.mark.parametrize("split", [True, False], ids=["heads apart", "heads together"])
@pytest.mark.parametrize("self_", [NEVER, ALWAYS], ids=["own image", "image of the source"])
@pytest.mark.parametrize("kind", KINDS)
def test_explicit_maps(kind: str, self_: Window, split: bool) -> None:
    """Rows of the image, [words | image]: prompts of unequal length, whose windows and gains are each token's own."""
    generator = torch.Generator().manual_seed(1)
    source_tokens = 7 if kind == "reweight" else 5
    source, own = random_rows(generator, source_tokens, 0, 6, 0), random_rows(generator, 7, 0, 6, 2)
    edit = published(kind, 10, source_tokens, 7)
    rule = ours([edit], 10, torch.zeros(1, 7, 4), source_tokens, self_)
    for step in range(10):
        expected, _ = edited_rows(edit, step, self_ is ALWAYS, source, own)
        if (now := rule.at(step / 10)) is None:
            continue
        result = through_call(now, source, own, split)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)


def test_replacement_is_the_sources_map_carried_over() -> None:
    """[A_s,text W | A_s,img], one attention by the source's queries and keys, whose rows sum to 1."""
    generator = torch.Generator().manual_seed(2)
    source, own = random_rows(generator, 5, 0, 6, 0), random_rows(generator, 7, 0, 6, 0)
    edit = windowed(published("replace", 10, 5, 7), 0, 10)
    whole = explicit(source.query[:, :, source.image], source.key)
    expected = torch.cat([whole[..., :5] @ edit.matrix, whole[..., 5:]], -1)
    torch.testing.assert_close(expected.sum(-1), torch.ones(2, 3, 6).double())
    result = through_call(ours([edit], 10, torch.zeros(1, 7, 4), 5, ALWAYS).at(0.0), source, own, True)
    torch.testing.assert_close(result[:, :, own.image], expected @ own.value)


def test_words_keep_their_share_of_a_row() -> None:
    """m_t W-carried words of the source, and A_t,img: rows sum to 1 as well."""
    generator = torch.Generator().manual_seed(3)
    source, own = random_rows(generator, 5, 0, 6, 0), random_rows(generator, 7, 0, 6, 0)
    edit = windowed(published("replace", 10, 5, 7), 0, 10)
    whole = explicit(own.query[:, :, own.image], own.key)
    share = whole[..., :7].sum(-1, keepdim=True)
    words = explicit(source.query[:, :, source.image], source.key[:, :, :5]) @ edit.matrix
    expected = torch.cat([share * words, whole[..., 7:]], -1)
    torch.testing.assert_close(expected.sum(-1), torch.ones(2, 3, 6).double())
    result = through_call(ours([edit], 10, torch.zeros(1, 7, 4), 5).at(0.0), source, own, True)
    torch.testing.assert_close(result[:, :, own.image], expected @ own.value)


@pytest.mark.parametrize("self_", [NEVER, ALWAYS], ids=["own image", "image of the source"])
def test_a_prompt_that_is_its_own_source_changes_nothing(self_: Window) -> None:
    own = random_rows(torch.Generator().manual_seed(4), 7, 0, 6, 2)
    same = Published(torch.eye(7).double(), None, torch.ones(7).double(), torch.zeros(7), torch.full((7,), 10))
    result = through_call(ours([same], 10, torch.zeros(1, 7, 4), 7, self_).at(0.0), own, own, True)
    torch.testing.assert_close(result, explicit(*own[:2]) @ own.value, rtol=0, atol=1e-14)


def test_a_prompt_that_the_model_cuts() -> None:
    """Of tables of 9 and 9 tokens the first 5 and 5 act; what went to others goes to the last."""
    generator = torch.Generator().manual_seed(5)
    source, own = random_rows(generator, 5, 0, 6, 0), random_rows(generator, 5, 0, 6, 0)
    edit = windowed(published("replace", 10, 9, 9), 0, 10)
    matrix = edit.matrix[:5, :5].clone()
    matrix[:, 4] += edit.matrix[:5, 5:].sum(1)
    torch.testing.assert_close(matrix.sum(1), torch.ones(5).double())
    rule = ours([edit], 10, torch.zeros(1, 9, 4), 9).at(0.0)
    short = windowed(Published(matrix, None, torch.ones(5).double(), torch.zeros(5), torch.zeros(5)), 0, 10)
    expected, _ = edited_rows(short, 0, False, source, own)
    result = through_call(rule, source._replace(words=9), own._replace(words=9), True)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


# --- through the models ----------------------------------------------------------------------------------------------


@contextmanager
def written_out(
    network: nn.Module, flow: Flow, options: dict, words: int, attend: Callable[[int, Rows], Tensor]
) -> Iterator[dict]:
    """Options by which each main block's first attention is what `attend` returns, [b, heads, tokens, d]."""
    now: list[int] = []

    def override(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, **kwargs) -> Tensor:
        if not now:
            return func(q, k, v, heads, *args, **kwargs)
        tensors = [t if flow.split else t.flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
        start = tensors[0].shape[2] - flow.image
        rows = Rows(*tensors, words, slice(start, start + POSITIONS))
        return attend(now.pop(), rows).transpose(1, 2).flatten(2)

    with ExitStack() as stack:
        for i, block in enumerate(blocks_of(network, flow)):
            handle = block.register_forward_pre_hook(lambda module, inputs, i=i: now.__setitem__(slice(None), [i]))
            stack.callback(handle.remove)
        yield {**options, "optimized_attention_override": override}


class Loop(OwnSampler):
    """Euler with each prompt in a call of its own, whose attention in the target's is written out as maps."""

    def __init__(self, flow: Flow, trajectory: Trajectory, edit: Published, self_: int) -> None:
        self.flow, self.trajectory, self.edit, self.self_ = flow, trajectory, edit, self_
        self.maps: list[tuple[Tensor, Tensor]] = []  # by step: of the words of source and target, means of layers

    def walk(self, run: Run) -> Tensor:
        model, flow = run.guider.inner_model, self.flow
        x = self.trajectory.states[0].to(run.latent)
        for i, sigma, below in run.steps():
            kept: dict[int, Rows] = {}
            seen: dict[str, list[Tensor]] = {"source": [], "positive": []}

            def keep(block: int, rows: Rows, kept: dict = kept, seen: dict = seen) -> Tensor:
                kept[block] = rows
                maps = explicit(rows.query, rows.key)
                seen["source"].append(maps[:, :, rows.image, : rows.words].mean(1))
                return maps @ rows.value

            def take(block: int, own: Rows, i: int = i, kept: dict = kept, seen: dict = seen) -> Tensor:
                result, words = edited_rows(self.edit, i, i < self.self_, self.moved(model, kept[block], own), own)
                seen["positive"].append(words.mean(1))
                return result

            def estimate(prompt: str, state: Tensor, attend: Callable, sigma: float = sigma) -> Tensor:
                options, conds = run.model_options["transformer_options"], run.guider.conds[prompt]
                words = conds[0]["cross_attn"].shape[1]
                with written_out(model.diffusion_model, flow, options, words, attend) as changed:
                    model_options = {**run.model_options, "transformer_options": changed}
                    sigmas = state.new_full((len(state),), sigma)
                    return calc_cond_batch(model, [conds], state, sigmas, model_options)[0]

            estimate("source", self.trajectory.states[i].to(x), keep)
            positive = estimate("positive", x, take)
            negative = estimate("negative", x, lambda block, rows: explicit(*rows[:2]) @ rows.value)
            x = x + (below - sigma) * (x - negative - CFG * (positive - negative)) / sigma
            self.maps.append(tuple(torch.stack(layers).mean(0) for layers in seen.values()))
        return x

    def moved(self, model: nn.Module, source: Rows, own: Rows) -> Rows:
        """The source behind a prompt of the target's length."""
        by = own.image.start - source.image.start
        if self.flow.name not in ("Lumina2", "Z-Image") or not by:
            return source
        q, k = (turned(model.diffusion_model, t.transpose(1, 2), by).transpose(1, 2) for t in source[:2])
        return source._replace(query=q, key=k)


def written_plainly(parts: Parts, loop: Loop) -> Tensor:
    guider = comfy.samplers.CFGGuider(parts.model)
    guider.inner_set_conds({"positive": parts.target, "negative": parts.negative, "source": parts.source})
    return guider.sample(torch.zeros_like(parts.image), parts.image, loop, parts.sigmas, disable_pbar=True, seed=0)


def setting(flow: Flow) -> tuple[Parts, Trajectory]:
    parts = Parts(flow)
    return parts, invert(parts.model, Guidance(parts.source), parts.image, parts.sigmas)


def edited(parts: Parts, trajectory: Trajectory, edit: Published, self_: Window = NEVER) -> ModelPatcher:
    source, target = parts.source[0][0].shape[1], parts.target[0][0]
    return attach(parts.model, trajectory, ours([edit], STEPS, target, source, self_, side=math.inf))


@pytest.mark.parametrize("kind", ["replace", "reweight o refine"])
@pytest.mark.parametrize("name", WORDED)
def test_equals_a_plain_loop(name: str, kind: str) -> None:
    """Prompts of 4 and 6 tokens, in calls of their own; each token's window and gain is its own."""
    flow = FLOWS[name]
    parts, trajectory = setting(flow)
    edit = published(kind, STEPS, 4, 6)
    guidance = Guidance(parts.target, parts.negative, CFG)
    before = resample(parts.model, trajectory, guidance)
    result = resample(edited(parts, trajectory, edit, Window(0, 0.4)), trajectory, guidance)
    expected = written_plainly(parts, Loop(flow, trajectory, edit, 2))
    assert close(result, expected, 1e-4)
    for other in (before, written_plainly(parts, Loop(flow, trajectory, edit, 0))):
        assert not close(result, other, 1e-3)
    assert torch.equal(resample(parts.model, trajectory, guidance), before)
    assert not any(module._forward_pre_hooks for module in parts.model.model.diffusion_model.modules())


def test_equals_a_plain_loop_where_prompts_are_padded_behind() -> None:
    """As Flux.2 klein's text encoder gives them, of 512 tokens; shorter ones the model would pad before."""
    flow = FLOWS["Flux.2"]
    parts, trajectory = setting(replace(flow, prompt=lambda seed, _: flow.prompt(seed, 512)))
    edit = published("reweight o replace", STEPS, 512, 512)
    result = resample(edited(parts, trajectory, edit), trajectory, Guidance(parts.target, parts.negative, CFG))
    assert close(result, written_plainly(parts, Loop(flow, trajectory, edit, 0)), 1e-4)
    assert not close(result, resample(parts.model, trajectory, Guidance(parts.target, parts.negative, CFG)), 1e-3)


@pytest.mark.parametrize("name", WORDED)
def test_windows_that_are_empty_change_no_bit(name: str) -> None:
    parts, trajectory = setting(FLOWS[name])
    edit = windowed(published("reweight o refine", STEPS, 4, 6), 0, 0)
    guidance = Guidance(parts.target, parts.negative, CFG)
    model, cost = metered(edited(parts, trajectory, edit))
    assert torch.equal(resample(model, trajectory, guidance), resample(parts.model, trajectory, guidance))
    assert sum(cost.rows) == 2 * STEPS


@pytest.mark.parametrize("name", WORDED)
def test_equal_prompts_at_one_state(name: str) -> None:
    """In the one step of a run that begins at the source's own state, a gain of 1 changes nothing and one of 2 does."""
    flow = FLOWS[name]
    parts = Parts(flow)
    sigmas = ddim_sigmas(parts.model, 1)
    trajectory = invert(parts.model, Guidance(parts.source), parts.image, sigmas)
    parts.target = parts.source
    plain = resample(parts.model, trajectory, Guidance(parts.target))
    for gain, changes in ((1.0, False), (2.0, True)):
        same = Published(torch.eye(4).double(), None, torch.full((4,), gain).double(), torch.zeros(4), torch.ones(4))
        model = attach(parts.model, trajectory, ours([same], 1, parts.target[0][0], 4, ALWAYS, side=math.inf))
        assert close(resample(model, trajectory, Guidance(parts.target)), plain, 1e-5) != changes


def test_what_the_edit_costs() -> None:
    """The source is one row, until both windows have ended."""
    parts, trajectory = setting(FLOWS["Flux"])
    for end, self_, steps in ((2, NEVER, 2), (2, Window(0, 0.8), 4), (STEPS, NEVER, STEPS)):
        edit = windowed(published("refine", STEPS, 4, 6), 0, end)
        model, cost = metered(edited(parts, trajectory, edit, self_))
        resample(model, trajectory, Guidance(parts.target, parts.negative, CFG))
        assert sum(cost.rows) == 2 * STEPS + steps


def test_words_beside_masactrl() -> None:
    """Two nodes on one MODEL: the content of the image's tokens by the one, their words by the other."""
    parts, trajectory = setting(FLOWS["Flux"])
    edit = windowed(published("replace", STEPS, 4, 6), 0, STEPS)
    guidance = Guidance(parts.target, parts.negative, CFG)
    words = edited(parts, trajectory, edit)
    (both,) = execute(MasaCtrlNode, model=words, trajectory=trajectory, start=0.0, first_layer=0)
    (content,) = execute(MasaCtrlNode, model=parts.model, trajectory=trajectory, start=0.0, first_layer=0)
    results = [resample(model, trajectory, guidance) for model in (both, words, content)]
    assert not any(close(results[0], other, 1e-3) for other in results[1:])
    (both,) = execute(
        MasaCtrlNode, model=edited(parts, trajectory, edit, ALWAYS), trajectory=trajectory, start=0.0, first_layer=0
    )
    with pytest.raises(ValueError, match="P2P Attention Controller and MasaCtrl on this MODEL both replace"):
        resample(both, trajectory, guidance)


@pytest.mark.parametrize(("name", "tokens", "inside"), [("Flux.2", 4, 512), ("Wan", 4, 0), ("HiDream", 8, 0)])
def test_words_that_do_not_stand_where_the_prompt_has_them(name: str, tokens: int, inside: int) -> None:
    """Padded before the prompt, in an attention of their own, or behind the image."""
    parts, trajectory = setting(FLOWS[name])
    model = edited(parts, trajectory, windowed(published("replace", STEPS, 4, 6), 0, STEPS))
    with pytest.raises(ValueError, match=f"A prompt of {tokens} tokens has {inside} inside this MODEL"):
        resample(model, trajectory, Guidance(parts.target, parts.negative, CFG))


def test_targets_of_unequal_length_are_refused() -> None:
    """To one length they are repeated, which would give words a larger share of a joint attention."""
    parts, trajectory = setting(FLOWS["Flux"])

    def words(tokens: int) -> Words:
        return words_between(["\u0120cat"] * (tokens - 1) + ["</s>"], 0, 1)

    def edit(*targets: int) -> PromptEdit:
        embeddings = ((parts.source[0][0], FLOWS["Flux"].prompt(2, tokens)[0][0]) for tokens in targets)
        return join([PromptEdit(words(4), (words(e.shape[1]),), ("swap",), (s, e)) for s, e in embeddings])

    prompt_to_prompt(parts.model, trajectory, edit(6, 6))
    with pytest.raises(ValueError, match="The targets of Batch Prompt Edits have 4, 6 tokens, but a flow model takes"):
        prompt_to_prompt(parts.model, trajectory, edit(4, 6))


def test_attentions_a_block() -> None:
    """Of the target, over all keys: as ever in its image's window alone, one more for a swap of all, else two."""
    parts, trajectory = setting(FLOWS["Flux"])
    parts.model = parts.model.clone()
    calls: list[tuple[int, int]] = []

    def count(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, **kwargs) -> Tensor:
        calls.append((q.shape[2], k.shape[2]))
        return func(q, k, v, heads, *args, **kwargs)

    parts.model.model_options["transformer_options"]["optimized_attention_override"] = count
    blocks, expected = 5, {("replace", ALWAYS): 1, ("refine", ALWAYS): 2, ("replace", NEVER): 2, ("refine", NEVER): 2}
    for (kind, self_), more in expected.items():
        calls.clear()
        model = edited(parts, trajectory, windowed(published(kind, STEPS, 4, 6), 0, STEPS), self_)
        resample(model, trajectory, Guidance(parts.target))
        assert sum(q == k for q, k in calls) == 2 * blocks * STEPS
        assert sum(q < k for q, k in calls) == more * blocks * STEPS
    calls.clear()
    model = edited(parts, trajectory, windowed(published("replace", STEPS, 4, 6), 0, 0), ALWAYS)
    resample(model, trajectory, Guidance(parts.target))
    assert len(calls) == 2 * blocks * STEPS


def test_words_beside_flow_edit_on_one_row() -> None:
    """A target that reads the source's words, its image and its prediction runs beside one row of it."""
    parts, trajectory = setting(FLOWS["Flux"])
    edit = windowed(published("refine", STEPS, 4, 6), 0, STEPS)
    flow_edit = edit_trajectory(parts.model, trajectory)
    rule = ours([edit], STEPS, parts.target[0][0], 4, Window(0, 0.4), side=math.inf)
    guidance = Guidance(parts.target, parts.negative, CFG)
    both, cost = metered(attach(flow_edit, trajectory, rule))
    result = resample(both, trajectory, guidance)
    assert sum(cost.rows) == 3 * STEPS
    for other in (flow_edit, attach(parts.model, trajectory, rule)):
        assert not close(result, resample(other, trajectory, guidance), 1e-3)


# --- maps of words ---------------------------------------------------------------------------------------------------


class Shown:
    """Keeps what it is shown of the maps of words, and blends nothing."""

    layout = False

    def __init__(self, source: Tensor, target: Tensor) -> None:
        self.columns = source, target
        self.maps: list[tuple[Tensor, Tensor]] = []

    def check(self, positive: Tensor, batch: int) -> None:
        """Any target will do."""

    def applies(self, fraction: float) -> bool:
        return True

    def mask(self, source: Tensor, target: Tensor, size: tuple[int, int]) -> Tensor:
        self.maps.append((source, target))
        return torch.ones(1, 1, *size)


def phrases(tokens: int, seed: int, count: int = 20) -> Tensor:
    """Columns of more phrases than a head has channels."""
    return (torch.rand(1, tokens, count, generator=torch.Generator().manual_seed(seed)) < 0.5).float()


@pytest.mark.parametrize("name", ["Flux", "SD3.5 medium", "Qwen-Image", "Lumina2", "Z-Image"])
def test_maps_are_those_written_out(name: str) -> None:
    """Means over heads and blocks, summed over the steps; the target's are the edited ones."""
    flow = FLOWS[name]
    parts, trajectory = setting(flow)
    edit = published("reweight o refine", STEPS, 4, 6)
    blend = Shown(phrases(4, 1), phrases(6, 2))
    guidance = Guidance(parts.target, parts.negative, CFG)
    model = edited(parts, trajectory, edit, Window(0, 0.4))
    result = resample(attach_blend(model, trajectory, blend), trajectory, guidance)
    assert close(result, resample(model, trajectory, guidance), 1e-6)
    loop = Loop(flow, trajectory, edit, 2)
    written_plainly(parts, loop)
    for ours_, theirs, columns in zip(blend.maps[-1], zip(*loop.maps, strict=True), blend.columns, strict=True):
        assert ours_.shape == (1, 20, 4, 4)
        expected = (sum(theirs) @ columns).transpose(1, 2).unflatten(-1, (4, 4))
        assert close(ours_, expected, 1e-4)


def test_two_targets_on_one_row_of_the_source() -> None:
    """Each image has its prompt, its tables and its phrases, and is edited and measured as it is alone."""
    parts, trajectory = setting(FLOWS["Flux"])
    targets = [parts.target[0], FLOWS["Flux"].prompt(8, 6)[0]]
    edits = [published("reweight o refine", STEPS, 4, 6, seed=5), published("replace", STEPS, 4, 6, seed=6)]
    columns = [(phrases(4, seed, 3), phrases(6, seed + 1, 3)) for seed in (1, 3)]

    def run(which: list[int]) -> tuple[Tensor, Shown]:
        embedding = torch.cat([targets[i][0] for i in which])
        pooled = torch.cat([targets[i][1]["pooled_output"] for i in which])
        blend = Shown(*(torch.cat([columns[i][side] for i in which]) for side in (0, 1)))
        rule = ours([edits[i] for i in which], STEPS, embedding, 4, Window(0, 0.4), side=math.inf)
        model, cost = metered(attach_blend(attach(parts.model, trajectory, rule), trajectory, blend))
        guidance = Guidance([[embedding, {"pooled_output": pooled}]], parts.negative, CFG)
        result = resample(model, trajectory, guidance)
        assert sum(cost.rows) == (2 * len(which) + 1) * STEPS
        return result, blend

    both, shown = run([0, 1])
    for i in (0, 1):
        alone, own = run([i])
        assert close(both[i : i + 1], alone, 1e-4)
        for ours_, theirs in zip(shown.maps[-1], own.maps[-1], strict=True):
            assert close(ours_[i : i + 1], theirs, 1e-4)


def test_frames_have_no_words() -> None:
    parts, trajectory = setting(replace(FLOWS["Qwen-Image"], latent=(1, 16, 3, 8, 8)))
    model = attach_blend(parts.model, trajectory, Shown(phrases(4, 1), phrases(6, 2)))
    with pytest.raises(ValueError, match="the latent has 3 frames: use a mask of your own"):
        resample(model, trajectory, Guidance(parts.target, parts.negative, CFG))
