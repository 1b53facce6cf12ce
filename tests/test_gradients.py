"""Gradients beside what other nodes put on the model: the same as if those had been written for them, or a sentence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.ops
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_base import ModelType
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from comfy_extras.nodes_freelunch import Fourier_filter, FreeU_V2
from comfy_extras.nodes_hypernetwork import load_hypernetwork_patch
from torch import Tensor

from palimpsest.host.run.model import identity
from palimpsest.inversion.null_text import Settings, null_text
from test_composition import Node, adapter, lora, lora_weights, patched
from test_cross_attention import guided, watched
from tiny import Tiny, TinyConfig, tiny_model

QUICK = Settings(inner_steps=2)
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True])


@pytest.fixture(autouse=True)
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# --- patches ---------------------------------------------------------------------------------------------------------


def freeu(model: ModelPatcher) -> ModelPatcher:
    return FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2).result[0]


def freeu_on_copies(h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    """FreeU_V2 of a model of 32 channels, writing into nothing."""
    if h.shape[1] != 64:
        return h, skip
    mean = h.mean(1, keepdim=True)
    low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
    first, second = h.chunk(2, 1)
    return torch.cat([first * (0.4 * (mean - low) / (high - low) + 1), second], 1), Fourier_filter(skip, 1, 0.2)


def hypernetwork(inference: bool) -> Node:
    def node(model: ModelPatcher) -> ModelPatcher:
        with torch.inference_mode(inference):
            generator = torch.Generator().manual_seed(1)

            def random(*shape: int) -> Tensor:
                return torch.randn(shape, generator=generator) * 0.1

            def half(width: int) -> dict[str, Tensor]:
                layers = [(f"linear.{i}", *sizes) for i, sizes in enumerate([(2 * width, width), (width, 2 * width)])]
                weights = {f"{name}.weight": random(after, before) for name, after, before in layers}
                return weights | {f"{name}.bias": random(after) for name, after, _ in layers}

            path = Path(folder_paths.temp_directory) / "hypernetwork.pt"
            torch.save({width: [half(width), half(width)] for width in (32, 64)} | {"activation_func": "relu"}, path)
            patch = load_hypernetwork_patch(str(path), 1.0)
        model = model.clone()
        model.set_model_attn1_patch(patch)
        model.set_model_attn2_patch(patch)
        return model

    return node


def image_prompt(inference: bool) -> Node:
    def node(model: ModelPatcher) -> ModelPatcher:
        with torch.inference_mode(inference):
            tokens = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(9))

        def attend(query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
            own = tokens.expand(len(query), -1, -1)
            return sum(optimized_attention(query, k, v, options["n_heads"]) for k, v in ((key, value), (own, own)))

        return patched("attn2_replace", attend, "middle", 0)(model)

    return node


def bypass_lora(model: ModelPatcher) -> ModelPatcher:
    return comfy.sd.load_bypass_lora_for_models(model, None, lora_weights(), 0.8, 0.0)[0]


def written_skip(h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    return h, skip.mul_(0.5)


def written_gate(query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
    return query.sigmoid().mul_(value.mean(1, keepdim=True))


def gate(query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
    return query.sigmoid() * value.mean(1, keepdim=True)


def halved_skip(h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    return h, skip * 0.5


# Nodes as they are, and written for gradients: with normal tensors, and writing into nothing.
PATCHES: dict[str, tuple[Node, Node]] = {
    "freeu": (freeu, patched("output_block_patch", freeu_on_copies)),
    "hypernetwork": (hypernetwork(True), hypernetwork(False)),
    "image prompt": (image_prompt(True), image_prompt(False)),
    "bypass lora": (bypass_lora, lora),
    "gate": (patched("attn2_replace", written_gate, "middle", 0), patched("attn2_replace", gate, "middle", 0)),
    "skip": (patched("output_block_patch", written_skip), patched("output_block_patch", halved_skip)),
}
each_patch = pytest.mark.parametrize("name", PATCHES)


@each_patch
@CHECKPOINTING
def test_attention_guides_through_patches(name: str, checkpointing: bool) -> None:
    tiny = Tiny(steps=2)
    node, differentiable = (patch(tiny.model) for patch in PATCHES[name])
    result = tiny.sample(guided(tiny, model=node, checkpointing=checkpointing))
    assert distance(result, tiny.sample(guided(tiny, model=differentiable))) < 1e-5
    assert distance(result, tiny.sample(node)) > 1e-4
    assert distance(result, tiny.sample(guided(tiny))) > 1e-4


@each_patch
def test_negatives_are_fitted_through_patches(name: str) -> None:
    tiny = Tiny(steps=2)
    node, differentiable = (patch(tiny.model) for patch in PATCHES[name])
    negative, found = null_text(node, tiny.trajectory, tiny.negative, QUICK, True)
    expected, _ = null_text(differentiable, tiny.trajectory, tiny.negative, QUICK, False)
    for (ours, _), (theirs, _) in zip(negative, expected, strict=True):
        assert distance(ours - tiny.negative[0][0], theirs - tiny.negative[0][0]) < 1e-3
    again = tiny.sample(node, tiny.source, negative, cfg=QUICK.cfg)
    assert distance(again, tiny.model.model.process_latent_out(found.states[-1])) < 1e-4


def test_prompts_that_run_alone_keep_their_places() -> None:
    """By which other packs tell the negative from the positive."""
    tiny = Tiny(steps=2)
    seen: set[tuple] = set()

    def note(hidden: Tensor, options: dict) -> Tensor:
        if not torch.is_inference_mode_enabled():
            seen.add((float(hidden.requires_grad), *options["cond_or_uncond"]))
        return hidden

    tiny.sample(guided(tiny, model=patched("attn1_output_patch", note)(tiny.model), two=True))
    assert seen == {(source_or_moved, at) for source_or_moved in (0, 1) for at in (0, 1)}
    model = adapter("input", 1)(tiny.model)
    negative, found = null_text(model, tiny.trajectory, tiny.negative, QUICK, True)
    again = tiny.sample(model, tiny.source, negative, cfg=QUICK.cfg)
    assert distance(again, tiny.model.model.process_latent_out(found.states[-1])) < 1e-4


def through_numpy(hidden: Tensor, options: dict) -> Tensor:
    return torch.from_numpy(hidden.numpy())


def into_a_buffer() -> Callable:
    buffers = {width: torch.zeros(width) for width in (32, 64)}

    def patch(hidden: Tensor, options: dict) -> Tensor:
        if not hidden.requires_grad:
            return hidden
        buffer = buffers[hidden.shape[-1]]
        buffer.copy_(hidden.mean((0, 1)))
        return hidden + buffer

    return patch


@pytest.mark.parametrize("make", [lambda: through_numpy, into_a_buffer], ids=["numpy", "buffer"])
@CHECKPOINTING
def test_what_lets_no_gradient_through_is_refused(make: Callable[[], Callable], checkpointing: bool) -> None:
    tiny = Tiny(steps=2)
    model = patched("attn2_output_patch", make())(tiny.model)
    said = "takes gradients through the MODEL, but a patch on it lets none through"
    with pytest.raises(ValueError, match=f"Cross Attention Guidance {said}"):
        tiny.sample(guided(tiny, model=model, checkpointing=checkpointing))
    with pytest.raises(ValueError, match=f"Null Text Inversion {said}"):
        null_text(model, tiny.trajectory, tiny.negative, QUICK, checkpointing)


# --- fp8 -------------------------------------------------------------------------------------------------------------


def fp8_models() -> tuple[ModelPatcher, ModelPatcher]:
    """A model whose attention multiplies in scaled fp8, as the host does on the cards that can, and its exact twin."""
    model, exact = TinyConfig.of(ModelType.EPS), tiny_model()
    model.custom_operations = comfy.ops.mixed_precision_ops({}, torch.float32, disabled=set())
    fast = model.get_model({}, device=torch.device("cpu"))
    state, told = {}, json.dumps({"format": "float8_e4m3fn"}).encode()
    for name, weight in exact.model.state_dict().items():
        state[name] = weight
        if weight.ndim == 2 and "transformer_blocks" in name:
            scale = weight.abs().max() / 448
            state[name] = (weight / scale).to(torch.float8_e4m3fn)
            state[f"{name}_scale"] = scale
            state[f"{name.removesuffix('weight')}comfy_quant"] = torch.tensor([*told], dtype=torch.uint8)
            weight.copy_(state[name].float() * scale)
    fast.load_state_dict(state)
    device = comfy.model_management.get_torch_device()
    return CoreModelPatcher(fast, load_device=device, offload_device=torch.device("cpu")), exact


@CHECKPOINTING
def test_layers_in_fp8_stay_so_but_for_the_gradient(checkpointing: bool) -> None:
    """What it moves by is exact, and what is sampled there is what the host's fast kernels make of it."""
    fast, exact = fp8_models()
    tiny = Tiny(steps=2, model=fast)
    plain = tiny.sample(fast)
    assert distance(tiny.sample(exact), plain) > 0.01
    assert torch.equal(tiny.sample(guided(tiny, amount=0.0, checkpointing=checkpointing)), plain)
    moves = []
    for model in (fast, exact):
        trajectory = tiny.trajectory._replace(model=identity(model))
        at = copy.copy(tiny)
        at.model, at.trajectory = model, trajectory
        model, before, after = watched(at, lambda m, at=at: guided(at, model=m, checkpointing=checkpointing))
        at.sample(model)
        moves.append(after[0] - before[0])
    assert distance(*moves) < 1e-4
    assert torch.equal(tiny.sample(fast), plain)


@CHECKPOINTING
def test_negatives_are_fitted_to_layers_in_fp8_without_it(checkpointing: bool) -> None:
    fast, exact = fp8_models()
    tiny = Tiny(steps=2, model=fast)
    plain = tiny.sample(fast)
    negative, _ = null_text(fast, tiny.trajectory, tiny.negative, QUICK, checkpointing)
    expected, _ = null_text(exact, tiny.trajectory._replace(model=identity(exact)), tiny.negative, QUICK, checkpointing)
    for (ours, _), (theirs, _) in zip(negative, expected, strict=True):
        assert distance(ours - tiny.negative[0][0], theirs - tiny.negative[0][0]) < 1e-3
    assert torch.equal(tiny.sample(fast), plain)
