"""Edits beside other packs' patches on the same MODEL: all take effect, and none is the other's undoing.

The host's own nodes are in works_with.py.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable

import comfy.cldm.cldm
import comfy.controlnet
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from palimpsest.attention.alignment import Carry
from palimpsest.attention.local_blend import LocalBlend
from palimpsest.attention.masactrl import MasaCtrl
from palimpsest.attention.p2p import PromptToPrompt, Window
from palimpsest.attention.pnp import PlugAndPlay
from palimpsest.attention.record import Recording, record_attention
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.host.files.store import AttentionStore
from palimpsest.host.layer import Edit, Inputs, Layer, Read
from palimpsest.inversion.run import Guidance, invert, record
from tiny import UNET, Tiny, conditioning, rows_of, tiny_model

ALWAYS = Window(0, 1)
TOKENS = 77

# --- edits -----------------------------------------------------------------------------------------------------------


def edit(kind: str) -> Edit:
    """A word swap by some mapper, a refinement in which four tokens are new, or an injection into the decoder."""
    decoder = tuple(("output", number) for number in (1, 2, 3))
    if kind == "pnp":
        return PlugAndPlay(decoder[:1], decoder, 1.0, 1.0)
    if kind == "masactrl":
        return MasaCtrl(frozenset((block, 0) for block in decoder), 0.0, False, None)
    own = torch.zeros(1, TOKENS)
    if kind == "swap":
        mapper = torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(5)).softmax(-1)
    else:
        own[:, 5:9] = 1
        mapper = torch.eye(TOKENS) * (1 - own)
    windows = torch.stack([torch.zeros(1, TOKENS), torch.ones(1, TOKENS)])
    return PromptToPrompt(Carry(mapper[None], own), conditioning(2)[0][0], torch.ones(1, TOKENS), windows, ALWAYS, 64)


class Still:
    """An edit whose target reads its own, in cross-attention as the sum of two terms."""

    node, everyone, features = "Still", False, ()

    def check(self, positive: Tensor, batch: int) -> None:
        pass

    def at(self, fraction: float) -> Still:
        return self

    def wants(self, layer: Layer) -> bool:
        return True

    def read(self, layer: Layer, source: Inputs, target: Inputs) -> tuple[Read, ...]:
        parts = (1.0,) if layer.kind == "self" else (0.25, 0.75)
        return tuple(Read(target._replace(value=part * target.value)) for part in parts)


def blend(width: int) -> LocalBlend:
    """Of the first columns of the image; the words of two tokens are measured, but exclude nothing."""
    columns = torch.zeros(1, TOKENS, 1)
    columns[:, 3:5] = 1
    part = (torch.arange(8) < width).float().expand(1, 8, 8)
    return LocalBlend((columns, columns), 1, conditioning(2)[0][0], -1.0, 0.3, 0.2, 0, part, False)


def stored(model: ModelPatcher, tiny: Tiny) -> AttentionStore:
    recording = Recording(ALWAYS, ALWAYS, 64, sys.maxsize, torch.float32, torch.device("cpu"), ALWAYS, (("output", 1),))
    return record_attention(model, tiny.trajectory, recording)


# --- other packs' nodes ----------------------------------------------------------------------------------------------

Node = Callable[[ModelPatcher], ModelPatcher]


def lora(model: ModelPatcher) -> ModelPatcher:
    return comfy.sd.load_lora_for_models(model, None, lora_weights(), 0.8, 0.0)[0]


def lora_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    weights = {}
    for block, width in (("input_blocks.1.1", 32), ("middle_block.1", 64), ("output_blocks.2.1", 32)):
        for layer in ("attn1.to_q", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0"):
            name = f"diffusion_model.{block}.transformer_blocks.0.{layer}"
            weights[f"{name}.lora_up.weight"] = torch.randn(width, 4, generator=generator) * 0.3
            weights[f"{name}.lora_down.weight"] = torch.randn(4, width, generator=generator) * 0.3
    return weights


def merged_model() -> ModelPatcher:
    model = tiny_model()
    weights = lora_weights()
    for name in {name.rsplit(".lora_", 1)[0] for name in weights}:
        layer = model.model.get_submodule(name)
        layer.weight += 0.8 * weights[f"{name}.lora_up.weight"] @ weights[f"{name}.lora_down.weight"]
    return model


def controlnet() -> tuple[comfy.controlnet.ControlNet, list[int]]:
    """A tiny random ControlNet with a hint, and a list that gets the number of rows of its calls."""
    network = comfy.cldm.cldm.ControlNet(hint_channels=3, dtype=torch.float32, device=torch.device("cpu"), **UNET)
    generator = torch.Generator().manual_seed(11)
    for parameter in network.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    calls: list[int] = []
    network.register_forward_pre_hook(lambda _, args, kwargs: calls.append(len(kwargs["x"])), with_kwargs=True)
    control = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))
    return control.set_cond_hint(torch.rand(1, 3, 64, 64, generator=generator)), calls


def adapter(*block: str | int) -> Node:
    """Adds attention to tokens of its own, for conditional and unconditional rows, as image prompt adapters do."""

    def attend(query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        kinds, heads = options["cond_or_uncond"], options["n_heads"]
        tokens = torch.randn(2, 4, query.shape[-1], generator=torch.Generator().manual_seed(9))
        tokens = tokens[kinds].repeat_interleave(len(query) // len(kinds), 0)
        return optimized_attention(query, key, value, heads) + optimized_attention(query, tokens, tokens, heads)

    return patched("attn2_replace", attend, *block)


def sharper(query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
    return optimized_attention(2 * query, key, value, options["n_heads"])


def longer(hidden: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    more = conditioning(10, 4)[0][0].expand(len(context), -1, -1)
    return hidden, torch.cat([context, more], 1), torch.cat([value, more], 1)


def louder(hidden: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    return hidden, context, 1.5 * value


def shifted(hidden: Tensor, options: dict) -> Tensor:
    return 1.5 * hidden + 0.1


def patched(kind: str, patch: Callable, *block: str | int) -> Node:
    def node(model: ModelPatcher) -> ModelPatcher:
        model = model.clone()
        getattr(model, f"set_model_{kind}")(patch, *block)
        return model

    return node


def merging(model: ModelPatcher) -> ModelPatcher:
    """Halves the positions of cross-attention and doubles them again, as token merging does."""
    rows = []

    def merge(hidden: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
        rows.append(len(hidden))
        return hidden.unflatten(1, (-1, 2)).mean(2), context, value

    def unmerge(hidden: Tensor, options: dict) -> Tensor:
        assert len(hidden) == rows.pop()
        return hidden.repeat_interleave(2, 1)

    model = model.clone()
    model.set_model_attn2_patch(merge)
    model.set_model_attn2_output_patch(unmerge)
    return model


NODES: dict[str, Node] = {
    "attn2_replace": adapter("input", 1),
    "attn2_replace of one layer": adapter("output", 2, 0),
    "attn1_replace": patched("attn1_replace", sharper, "middle", 0),
    "attn2_patch": patched("attn2_patch", louder),
    "attn2_patch of more tokens": patched("attn2_patch", longer),
    "attn2_output_patch": patched("attn2_output_patch", shifted),
    "token merging": merging,
}
UNMEASURED = ("attn2_patch of more tokens", "token merging")  # word maps have no meaning beside these

each_node = pytest.mark.parametrize("node", NODES)
each_edit = pytest.mark.parametrize("kind", ["swap", "refine"])


def but(*names: str) -> list[str]:
    return [name for name in NODES if name not in names]


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() < 1e-4 * other.norm())


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    with torch.inference_mode():
        return Tiny()


@pytest.fixture(scope="module")
def sampled(tiny: Tiny) -> Callable[[str | None, str | None], Tensor]:
    """What a node gives with an edit after it, each or none."""

    @functools.cache
    def sampled(node: str | None, kind: str | None) -> Tensor:
        model = NODES[node](tiny.model) if node else tiny.model
        return tiny.sample(attach(model, tiny.trajectory, edit(kind)) if kind else model)

    return sampled


@each_node
@pytest.mark.parametrize("kind", ["swap", "refine", "pnp", "masactrl"])
def test_edit_and_node_both_take_effect_in_any_order(tiny: Tiny, sampled: Callable, node: str, kind: str) -> None:
    both = sampled(node, kind)
    assert torch.isfinite(both).all()
    assert close(tiny.sample(NODES[node](attach(tiny.model, tiny.trajectory, edit(kind)))), both)
    for alone in (sampled(node, None), sampled(None, kind)):
        assert (both - alone).norm() > 1e-3 * both.norm()


@each_node
def test_rows_that_only_read_leave_a_node_its_work(tiny: Tiny, sampled: Callable, node: str) -> None:
    """Those of the source, and those of an attention's further terms."""
    still = attach(NODES[node](tiny.model), tiny.trajectory, Still())
    assert close(tiny.sample(still), sampled(node, None))


@pytest.mark.parametrize("node", but(*UNMEASURED))
@each_edit
def test_a_local_blend_leaves_a_node_its_work(tiny: Tiny, sampled: Callable, node: str, kind: str) -> None:
    edited = attach(NODES[node](tiny.model), tiny.trajectory, edit(kind))
    assert close(tiny.sample(attach_blend(edited, tiny.trajectory, blend(8))), sampled(node, kind))
    before = attach_blend(tiny.model, tiny.trajectory, blend(4))
    blended = tiny.sample(attach(NODES[node](before), tiny.trajectory, edit(kind)))
    torch.testing.assert_close(blended[..., 4:], tiny.image[..., 4:])
    assert not close(blended[..., :4], tiny.image[..., :4])


@pytest.mark.parametrize("node", but(*UNMEASURED))
@each_edit
def test_an_attention_store_gives_the_live_result(tiny: Tiny, sampled: Callable, node: str, kind: str) -> None:
    model, rows = rows_of(NODES[node](tiny.model))
    store = stored(model, tiny)
    rows.clear()
    assert close(tiny.sample(attach(model, tiny.trajectory, edit(kind), store)), sampled(node, kind))
    assert max(rows) == 2


@pytest.mark.parametrize(
    ("node", "sentence"),
    [*zip(UNMEASURED, ["the prompt from 77 to 81 tokens", "a layer of 64 positions to 32"], strict=True)],
)
def test_word_maps_refuse_what_a_patch_changed(tiny: Tiny, node: str, sentence: str) -> None:
    model = NODES[node](tiny.model)
    blended = attach_blend(model, tiny.trajectory, blend(4))
    for measure in (lambda: tiny.sample(blended), lambda: stored(model, tiny)):
        with pytest.raises(ValueError, match=f"Another patch changed {sentence}"):
            measure()


@pytest.mark.parametrize("blended", [False, True])
@pytest.mark.parametrize(("kind", "rows"), [("swap", 3), ("refine", 4)])
def test_a_foreign_replacement_is_called_once_a_step(tiny: Tiny, kind: str, rows: int, blended: bool) -> None:
    """With the rows of source, target and negative, and those of further terms."""
    calls = []

    def watch(query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        calls.append(len(query))
        assert sorted(set(options["cond_or_uncond"])) == [0, 1]
        assert len(options["cond_or_uncond"]) == len(query)
        return optimized_attention(query, key, value, options["n_heads"])

    model = attach(tiny.model, tiny.trajectory, edit(kind))
    if blended:
        model = attach_blend(model, tiny.trajectory, blend(4))
    for block in (("input", 1), ("output", 2, 0)):
        model.set_model_attn2_replace(watch, *block)
    tiny.sample(model)
    assert calls == [rows] * 10


@each_edit
def test_an_edit_with_a_lora_is_that_of_merged_weights(tiny: Tiny, kind: str) -> None:
    """From the inversion on."""
    merged = Tiny(model=merged_model())
    trajectory = invert(lora(tiny.model), Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas)
    assert close(trajectory.states, merged.trajectory.states)
    assert not close(trajectory.states, tiny.trajectory.states)
    ours = tiny.sample(attach(lora(tiny.model), trajectory, edit(kind)), noise=merged.noise)
    assert close(ours, merged.sample(attach(merged.model, merged.trajectory, edit(kind))))


@pytest.mark.parametrize(("kind", "everywhere"), [("swap", False), ("refine", True)])
def test_a_controlnet_on_the_target(tiny: Tiny, sampled: Callable, kind: str, everywhere: bool) -> None:
    control, calls = controlnet()
    options = {"control": control, "control_apply_to_uncond": everywhere}
    target = [[tiny.target[0][0], options]]
    edited = attach(tiny.model, tiny.trajectory, edit(kind))
    both = tiny.sample(edited, positive=target)
    assert calls == [2 if everywhere else 1] * 5
    alone = tiny.sample(tiny.model, positive=target)
    for other in (alone, sampled(None, kind)):
        assert (both - other).norm() > 1e-3 * both.norm()
    assert close(tiny.sample(attach(tiny.model, tiny.trajectory, Still()), positive=target), alone)
    assert close(tiny.sample(attach_blend(edited, tiny.trajectory, blend(8)), positive=target), both)
    from_store = attach(tiny.model, tiny.trajectory, edit(kind), stored(tiny.model, tiny))
    assert close(tiny.sample(from_store, positive=target), both)


def test_a_controlnet_of_the_source_and_the_target(tiny: Tiny) -> None:
    """A recorded run edited to its own prompt, with its ControlNet, is that run again."""
    control, calls = controlnet()
    source = [[tiny.source[0][0], {"control": control, "control_apply_to_uncond": True}]]
    guidance, euler = Guidance(source, tiny.negative, 3.0), comfy.samplers.sampler_object("euler")
    noise = torch.randn_like(tiny.noise)
    trajectory, image = record(tiny.model, guidance, euler, tiny.sigmas, noise, torch.zeros_like(noise), seed=0)
    calls.clear()
    own = dataclasses.replace(edit("refine"), target=source[0][0])
    noise = tiny.model.model.process_latent_out(trajectory.states[0])
    again = tiny.sample(attach(tiny.model, trajectory, own), positive=source, cfg=3.0, noise=noise)
    assert calls == [1, 2] * 5
    assert close(again, image)
    without = trajectory._replace(conditioning=tiny.source)
    assert not close(tiny.sample(attach(tiny.model, without, own), positive=source, cfg=3.0, noise=noise), image)
