"""What the pack's work on flow transformers stands on, found by running the host's own classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.latent_formats import LatentFormat
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from flows import FLOWS, Flow, randn

REFINED = ("Lumina2", "Z-Image")  # text and image each have attention of their own before the main blocks
UNNAMED = ("SD3", "SD3.5 medium", "HiDream")  # transformer_options name no block


@pytest.fixture(params=FLOWS)
def flow(request: pytest.FixtureRequest) -> Flow:
    return FLOWS[request.param]


@dataclass
class Call:
    """One attention call."""

    block: tuple[str, int] | None  # the main block that it is in
    q: Tensor
    k: Tensor
    heads: int
    split: bool
    options: dict

    def tokens(self, of: Tensor) -> int:
        return of.shape[2 if self.split else 1]


@dataclass
class Seen:
    calls: list[Call]
    entered: list[tuple[str, int]]  # main blocks, each with transformer_options among its keyword arguments
    applied: list[list[int]]  # cond_or_uncond of every call of apply_model
    wrapped: int = 0  # calls of the DIFFUSION_MODEL wrapper

    def main(self) -> list[Call]:
        """The first call in each main block."""
        return [call for i, call in enumerate(self.calls) if call.block and call.block != self._before(i)]

    def _before(self, i: int) -> tuple[str, int] | None:
        return self.calls[i - 1].block if i else None


@contextmanager
def watched(model: ModelPatcher, flow: Flow) -> Iterator[tuple[ModelPatcher, Seen]]:
    """A clone of `model` and what is seen of its calls."""
    seen = Seen([], [], [])
    inside: list[tuple[str, int]] = []

    def attend(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, **kwargs) -> Tensor:
        options = dict(kwargs["transformer_options"])
        seen.calls.append(Call(inside[-1] if inside else None, q, k, heads, kwargs.get("skip_reshape", False), options))
        return func(q, k, v, heads, *args, **kwargs)

    def apply(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs) -> Tensor:
        seen.applied.append(transformer_options["cond_or_uncond"])
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def diffuse(executor, *args, **kwargs) -> Tensor:
        seen.wrapped += 1
        return executor(*args, **kwargs)

    def enter(block: tuple[str, int]) -> Callable:
        def hook(module, args: tuple, kwargs: dict) -> None:
            inside.append(block)
            if "transformer_options" in kwargs:
                seen.entered.append(block)

        return hook

    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = attend
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", apply)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", diffuse)
    hooks = []
    for attribute in flow.blocks:
        for i, block in enumerate(getattr(model.model.diffusion_model, attribute)):
            hooks.append(block.register_forward_pre_hook(enter((attribute, i)), with_kwargs=True))
            hooks.append(block.register_forward_hook(lambda *_: inside.pop() and None))
    try:
        yield model, seen
    finally:
        for hook in hooks:
            hook.remove()


def sample(
    model: ModelPatcher, noise: Tensor, positive: list, negative: list, steps: int = 4, cfg: float = 3
) -> Tensor:
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    latent = torch.zeros_like(noise)
    euler = comfy.samplers.sampler_object("euler")
    return comfy.sample.sample_custom(
        model, noise, cfg, euler, sigmas, positive, negative, latent, disable_pbar=True, seed=0
    )


def look(flow: Flow, positive: list, negative: list | None = None, noise: Tensor | None = None) -> Seen:
    """What is seen of one step; without a negative prompt that is one call of one row."""
    with watched(flow.make(), flow) as (model, seen):
        noise = randn(3, *flow.latent) if noise is None else noise
        sample(model, noise, positive, negative or positive, steps=1, cfg=3 if negative else 1)
    return seen


def blocks_of(flow: Flow) -> list[tuple[str, int]]:
    network = flow.make().model.diffusion_model
    return [(name, i) for name in flow.blocks for i in range(len(getattr(network, name)))]


def places(flow: Flow, tokens: int) -> tuple[range, range]:
    """Where text and image stand in the main attention."""
    text = 0 if flow.order == "image" else flow.text(tokens)
    if flow.order == "text image":
        return range(text), range(text, text + flow.image)
    return range(flow.image, flow.image + text), range(flow.image)


def changed(flow: Flow, first: Seen, second: Seen) -> set[int]:
    """The tokens whose queries differ in the first main block."""
    rows = [(q if flow.split else q.unsqueeze(1))[0] for q in (first.main()[0].q, second.main()[0].q)]
    return set((rows[0] - rows[1]).abs().amax((0, 2)).gt(1e-4).nonzero().flatten().tolist())


def test_samples(flow: Flow) -> None:
    model = flow.make()
    noise, prompt, negative = randn(3, *flow.latent), flow.prompt(1, 20), flow.prompt(2, 11)
    usual = sample(model, noise, prompt, negative)
    assert usual.shape == flow.latent
    assert usual.isfinite().all()

    def difference(*inputs) -> float:
        return ((sample(model, *inputs) - usual).std() / usual.std()).item()

    assert usual.std((-2, -1)).min() > 0.05
    assert difference(noise, prompt, negative) == 0
    assert torch.equal(sample(flow.make(), noise, prompt, negative), usual)
    assert difference(randn(4, *flow.latent), prompt, negative) > 0.1
    assert difference(noise, flow.prompt(5, 20), negative) > 0.05
    assert difference(noise, prompt, flow.prompt(5, 11)) > 0.02


def test_velocity_depends_on_the_latent(flow: Flow) -> None:
    """As strongly as it can without being chaos: an inversion has something to get wrong."""
    model, noise, prompt = flow.make(), randn(3, *flow.latent), flow.prompt(1, 20)
    step = 1e-2 * randn(4, *flow.latent)
    # One step from sigma 1 to 0 goes from x to x - v.
    latents: LatentFormat = model.get_model_object("latent_format")
    start, end = (latents.process_in(sample(model, x, prompt, prompt, steps=1, cfg=1)) for x in (noise, noise + step))
    slope = (end - start - step).norm() / step.norm()
    assert 0.3 < slope < 3


def test_layout(flow: Flow) -> None:
    seen = look(flow, flow.prompt(1, 20))
    text, image = places(flow, 20)
    assert [call.block for call in seen.main()] == blocks_of(flow)
    for call in seen.main():
        assert call.split == flow.split
        assert call.q.shape == call.k.shape
        assert call.tokens(call.q) == len(text) + len(image)
        assert call.q.ndim == (4 if flow.split else 3)
        assert flow.split == (call.q.shape[1] == call.heads)


def test_further_attention(flow: Flow) -> None:
    """The first call in a main block is the one over the image; others follow it, or stand outside."""
    seen = look(flow, flow.prompt(1, 20))
    main = seen.main()
    others = [call for call in seen.calls if not any(call is one for one in main)]
    lengths = [(call.block, call.tokens(call.q), call.tokens(call.k)) for call in others]
    if flow.name == "Wan":
        assert lengths == [(block, flow.image, 20) for block in blocks_of(flow)]
    elif flow.name == "SD3.5 medium":
        assert lengths == [(block, flow.image, flow.image) for block in blocks_of(flow)[:2]]
    elif flow.name in REFINED:
        assert lengths == [(None, length, length) for length in (flow.text(20), flow.image)]
    else:
        assert not lengths


def test_order(flow: Flow) -> None:
    """The prompt's embeddings reach the queries of text tokens alone, the latent those of image tokens alone."""
    prompt, other = flow.prompt(1, 20), flow.prompt(2, 20)
    other[0][1].pop("pooled_output", None)  # which modulates all of them
    other[0][1] = prompt[0][1] | other[0][1]
    text, image = places(flow, 20)
    seen = look(flow, prompt)
    of_text = changed(flow, seen, look(flow, other))
    of_image = changed(flow, seen, look(flow, prompt, noise=randn(5, *flow.latent)))
    # Flux.2's pads come before the text and are the same for every prompt.
    assert of_text == (set(text[-20:]) if flow.name == "Flux.2" else set(text))
    assert of_image == set(image)


def test_options(flow: Flow) -> None:
    for call in look(flow, flow.prompt(1, 20), flow.prompt(2, 11)).main():
        options = call.options
        assert options["cond_or_uncond"] in ([0], [1], [1, 0])
        assert options["sigmas"].shape == (1,)
        if flow.name in UNNAMED:
            assert "block_type" not in options
            assert "block_index" not in options
        else:
            assert options["block_index"] == call.block[1]
            assert options["block_type"] == ("single" if call.block[0] == "single_blocks" else "double")
        if call.block[0] == "single_blocks":
            tokens = call.tokens(call.q)
            assert options["img_slice"] == [tokens - flow.image, tokens]
        else:
            assert "img_slice" not in options


def test_hooks_and_wrappers(flow: Flow) -> None:
    """Every main block passes a forward pre-hook once a call, with the options; SD3 has no DIFFUSION_MODEL wrapper."""
    seen = look(flow, flow.prompt(1, 20), flow.prompt(2, 11))
    assert seen.entered == blocks_of(flow) * len(seen.applied)
    assert seen.wrapped == (0 if flow.name.startswith("SD3") else len(seen.applied))


def test_rows(flow: Flow) -> None:
    """Prompts of one length share a call, the negative one first; else the positive one goes first, by itself."""
    assert look(flow, flow.prompt(1, 20), flow.prompt(2, 20)).applied == [[1, 0]]
    apart = look(flow, flow.prompt(1, 20), flow.prompt(2, 11)).applied
    assert apart == ([[1, 0]] if flow.name == "Flux.2" else [[0], [1]])


def with_reference(flow: Flow) -> tuple[Seen, set[int]]:
    """What is seen with a reference latent, and the tokens that depend on it."""
    embeddings, values = flow.prompt(1, 20)[0]
    reference = randn(6, *flow.latent)
    several = [look(flow, [[embeddings, values | {"reference_latents": [sign * reference]}]]) for sign in (1, -1)]
    return several[0], changed(flow, *several)


@pytest.mark.parametrize("name", ["Flux", "Flux dev", "Flux.2", "Qwen-Image"])
def test_reference_latents_stand_last(name: str) -> None:
    flow = FLOWS[name]
    seen, reference = with_reference(flow)
    _, image = places(flow, 20)
    assert reference == set(range(image.stop, image.stop + flow.image))
    for call in seen.main():
        assert call.options["reference_image_num_tokens"] == [flow.image]


def test_z_images_reference_latents_stand_before_the_image() -> None:
    """Each brings a caption, of pads where it has none, which stands before the prompt's."""
    flow = FLOWS["Z-Image"]
    seen, reference = with_reference(flow)
    captions = flow.text(0) + 32 + flow.text(20)
    assert {call.tokens(call.q) for call in seen.main()} == {captions + 2 * flow.image}
    # The image's own tokens were refined among the reference's.
    assert reference == set(range(captions, captions + 2 * flow.image))
