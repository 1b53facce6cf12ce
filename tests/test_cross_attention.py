"""Cross-attention guidance: its gradient against float64, its step in a run, and what it leaves alone."""

from __future__ import annotations

from functools import partial

import comfy.ldm.modules.attention
import comfy.model_management
import pytest
import torch
from comfy.model_base import ModelType
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from palimpsest.attention.local_blend import LocalBlend
from palimpsest.attention.pnp import PlugAndPlay
from palimpsest.guidance.cross_attention import CrossAttentionGuidance
from palimpsest.guidance.negative_prompt import CONSTANT, Mixture
from palimpsest.host.branch.guide import attach_guide
from palimpsest.host.branch.negatives import attach_mixture
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.host.run.model import add_outermost
from palimpsest.host.unet.tree import all_layers
from palimpsest.inversion.run import Guidance, invert
from palimpsest.nodes.cross_attention import TWO, CrossAttentionGuidanceNode
from reference import explicit, in_float64
from test_composition import controlnet
from test_source import some_mapper, swap
from tiny import Tiny, conditioning, execute, rows_of, tiny_model

AMOUNT = 0.5
PNP = PlugAndPlay((("output", 1),), (("output", 1), ("output", 2)), 0.8, 0.4)


def guided(
    tiny: Tiny, amount: float = AMOUNT, end: float = 1.0, max_side: int = 64, checkpointing=False, model=None, two=False
):
    guide = CrossAttentionGuidance(amount, end, max_side, two)
    return attach_guide(tiny.model if model is None else model, tiny.trajectory, guide, checkpointing)


def watched(tiny: Tiny, attach_it) -> tuple:
    """`attach_it(model)`, and the sampler's x before and after the guidance at every model call."""
    before, after = [], []

    def keep(kept: list[Tensor]):
        def wrapper(executor, x: Tensor, *args):
            kept.append(x.clone())
            return executor(x, *args)

        return wrapper

    model = attach_it(tiny.model)
    add_outermost(model, WrappersMP.PREDICT_NOISE, "test.before", keep(before))
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test.after", keep(after))
    return model, before, after


class Classic:
    """The network in float64, a call for each row, with its cross-attention maps laid open."""

    def __init__(self, tiny: Tiny, max_side: int = 64) -> None:
        self.tiny, self.max_side = tiny, max_side
        with torch.inference_mode(False):
            unet, self.predict = in_float64(tiny.model)
            unet.requires_grad_(False)

    def run(self, x: Tensor, step: int, prompt: list) -> tuple[Tensor, list[Tensor]]:
        """eps of x [b, c, h, w] at a step, and the maps [b, heads, positions, tokens] of each layer that counts."""
        maps = []

        def attend(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
            q, k, v = (t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
            own = explicit(q, k)
            if own.shape[2] <= self.max_side**2:
                maps.append(own)
            return (own @ v).transpose(1, 2).flatten(2)

        blocks = [(name, i) for name in ("input", "middle", "output") for i in range(12)]
        options = {"patches_replace": {"attn2": dict.fromkeys(blocks, attend)}}
        return self.predict(x, self.tiny.sigmas[step].double(), prompt, options), maps

    def loss(self, x: Tensor, step: int, prompt: list | None = None, source: list | None = None) -> Tensor:
        """Mean over heads, sum over layers, positions and tokens, of what the two prompts' maps differ by, squared."""
        state = self.tiny.trajectory.states[step].double().clone()
        theirs = self.run(state, step, source or self.tiny.source)[1]
        ours = self.run(x, step, prompt or self.tiny.target)[1]
        return sum((a - b).square().sum() / a.shape[1] for a, b in zip(ours, theirs, strict=True))

    def gradient(self, x: Tensor, step: int, *prompts: list) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(self.loss(leaf, step, *prompts), leaf)[0]

    def sample(self, cfg: float, amount: float, two_latents: bool = False) -> Tensor:
        """DDIM (Euler in sigma) with the paper's step z - amount dL/dz, z = x / sqrt(1 + sigma^2), before each one."""
        x = self.tiny.trajectory.states[0].double().clone()
        sigmas = self.tiny.sigmas.double()
        for step, sigma in enumerate(sigmas[:-1]):
            scale = (1 + sigma**2).sqrt()

            def moved(*prompts: list, x: Tensor = x, step: int = step, scale: Tensor = scale) -> Tensor:
                return (x / scale - amount * scale * self.gradient(x, step, *prompts)) * scale

            of_target = moved(self.tiny.target, self.tiny.source)
            x = moved(self.tiny.negative, self.tiny.negative) if two_latents else of_target
            target, negative = self.run(of_target, step, self.tiny.target)[0], self.run(x, step, self.tiny.negative)[0]
            x = x + (sigmas[step + 1] - sigma) * (negative + cfg * (target - negative))
        return x


KINDS = pytest.mark.parametrize("kind", [ModelType.EPS, ModelType.V_PREDICTION])


@KINDS
@pytest.mark.parametrize("max_side", [64, 4])
def test_the_gradient_equals_finite_differences(kind: ModelType, max_side: int) -> None:
    tiny = Tiny(model=tiny_model(kind))
    model, before, after = watched(tiny, lambda m: guided(tiny, max_side=max_side, model=m))
    tiny.sample(model, cfg=1.0)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        classic = Classic(tiny, max_side)
        for step in (0, 3):
            x = before[step].double().clone()
            moved = x - after[step].double()
            gradient = moved / (AMOUNT * (1 + tiny.sigmas[step].double() ** 2))
            for _ in range(3):
                along = torch.randn(x.shape, generator=generator, dtype=torch.float64)
                along += gradient * (along.norm() / gradient.norm())  # a part that surely matters
                h = 1e-4
                slope = (classic.loss(x + h * along, step) - classic.loss(x - h * along, step)) / (2 * h)
                assert abs((gradient * along).sum() - slope) < 2e-3 * abs(slope)


@KINDS
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("two", [False, True])
def test_a_run_equals_the_formula_in_float64(kind: ModelType, checkpointing: bool, two: bool) -> None:
    tiny = Tiny(model=tiny_model(kind))
    ours = tiny.model.model.process_latent_in(tiny.sample(guided(tiny, checkpointing=checkpointing, two=two)))
    with torch.inference_mode(False), torch.enable_grad():
        classic = Classic(tiny)
        theirs, plain = classic.sample(4.0, AMOUNT, two), classic.sample(4.0, 0.0)
    assert (plain - theirs).norm() > 1e-3 * theirs.norm()  # the guidance does something here
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_in_half_precision(checkpointing: bool) -> None:
    """Nothing of them is lost below what fp16 can hold."""
    moves = []
    for dtype in (torch.float32, torch.float16):
        tiny = Tiny()
        tiny.model.model.diffusion_model.to(dtype).dtype = dtype
        model, before, after = watched(tiny, partial(guided, tiny, AMOUNT, 1.0, 64, checkpointing))
        tiny.sample(model, cfg=1.0)
        moves.append((after[0] - before[0]).double())
    assert (moves[1] - moves[0]).norm() < 0.01 * moves[0].norm()


def test_the_loss_falls_at_every_step(tiny: Tiny) -> None:
    model, before, after = watched(tiny, lambda m: guided(tiny, amount=0.05, model=m))
    tiny.sample(model)
    assert len(before) == 5
    with torch.inference_mode(False):
        classic = Classic(tiny)
        for step, (x, moved) in enumerate(zip(before, after, strict=True)):
            assert classic.loss(moved.double().clone(), step) < classic.loss(x.double().clone(), step)


@pytest.mark.parametrize("settings", [{"amount": 0.0}, {"end": 0.0}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_op_settings_equal_the_plain_sampler_bit_for_bit(tiny: Tiny, settings: dict, checkpointing: bool) -> None:
    plain = tiny.sample(tiny.model)
    assert torch.equal(tiny.sample(guided(tiny, **settings, checkpointing=checkpointing)), plain)
    assert not torch.equal(tiny.sample(guided(tiny, checkpointing=checkpointing)), plain)


def test_the_sources_own_prompt_and_noise_move_nothing(tiny: Tiny) -> None:
    """But for rounding: the sampler's noise has been scaled to a latent and back."""
    moves = []
    for prompt in (tiny.source, tiny.target):
        model, before, after = watched(tiny, lambda m: guided(tiny, model=m))
        tiny.sample(model, positive=prompt)
        moves.append((after[0] - before[0]).norm())
    assert moves[0] < 1e-4 * moves[1]


def test_rows_a_step(tiny: Tiny) -> None:
    """The source and the target alone, then the sampler's own call."""
    model, rows = rows_of(tiny.model)
    tiny.sample(guided(tiny, end=0.4, model=model))
    assert rows == [1, 1, 2] * 2 + [2] * 3
    rows.clear()
    tiny.sample(guided(tiny, model=model), cfg=1.0)
    assert rows == [1, 1, 1] * 5
    rows.clear()
    tiny.sample(guided(tiny, end=0.4, model=model, two=True))
    checks = [2, 2]  # in the first step: whether another node mixes the prompts
    # The negative alone as well, and the sampler's call in two.
    assert rows == [1, 1] * 2 + checks + [1, 1] + [1, 1] * 3 + [2] * 3


def test_checkpointing_runs_blocks_twice_and_changes_nothing(tiny: Tiny) -> None:
    calls = []
    handle = tiny.model.model.diffusion_model.middle_block[1].register_forward_pre_hook(lambda *_: calls.append(1))
    results, counts = [], []
    for checkpointing in (False, True):
        calls.clear()
        results.append(tiny.sample(guided(tiny, checkpointing=checkpointing)))
        counts.append(len(calls))
    handle.remove()
    assert counts == [3 * 5, 4 * 5]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("two", [False, True])
def test_a_batch_equals_its_images(sources: int, two: bool) -> None:
    """Two images, or one that is edited by two prompts."""
    both = Tiny(batch=sources)
    prompts = [conditioning(2)[0][0], conditioning(8)[0][0]]
    noise = both.noise.expand(2, -1, -1, -1).clone()
    together = both.sample(guided(both, two=two), positive=[[torch.cat(prompts), {}]], noise=noise)
    for i, prompt in enumerate(prompts):
        states = both.trajectory.states[:, i : i + 1] if sources == 2 else both.trajectory.states
        guide = CrossAttentionGuidance(AMOUNT, 1.0, 64, two)
        model = attach_guide(both.model, both.trajectory._replace(states=states), guide, False)
        alone = both.sample(model, positive=[[prompt, {}]], noise=noise[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("edit", [PNP, swap(some_mapper())], ids=["pnp", "p2p"])
@pytest.mark.parametrize("two", [False, True])
def test_it_stands_beside_an_edit_in_either_order(tiny: Tiny, edit, two: bool) -> None:
    alone = tiny.sample(attach(tiny.model, tiny.trajectory, edit))
    first = tiny.sample(attach(guided(tiny, two=two), tiny.trajectory, edit))
    last = tiny.sample(guided(tiny, model=attach(tiny.model, tiny.trajectory, edit), two=two))
    assert torch.equal(first, last)
    assert (first - alone).norm() > 1e-3 * alone.norm()
    idle = tiny.sample(guided(tiny, amount=0.0, model=attach(tiny.model, tiny.trajectory, edit)))
    assert torch.equal(idle, alone)


@pytest.mark.parametrize("two", [False, True])
def test_local_blend_has_the_last_word(tiny: Tiny, two: bool) -> None:
    mask = torch.zeros(1, 8, 8)
    mask[..., :4, :] = 1
    blend = LocalBlend(None, 0, None, 0.3, 0.0, 0.0, 0, mask, False)
    source = tiny.model.model.process_latent_out(tiny.trajectory.states[-1])
    for model in (
        attach_blend(guided(tiny, two=two), tiny.trajectory, blend),
        guided(tiny, model=attach_blend(tiny.model, tiny.trajectory, blend), two=two),
    ):
        result = tiny.sample(model)
        assert torch.equal(result[..., 4:, :], source[..., 4:, :])
        assert not torch.equal(result[..., :4, :], source[..., :4, :])


def test_heun_is_guided_at_every_call_within_the_run(tiny: Tiny) -> None:
    model, before, after = watched(tiny, lambda m: guided(tiny, model=m))
    tiny.sample(model, sampler="heun")
    assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True] * 9 + [False]


def test_another_packs_cross_attention_is_guided_too(tiny: Tiny) -> None:
    """It runs in both passes, and the gradient flows through it."""

    def half(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, options["n_heads"]) * 0.5

    model = tiny.model.clone()
    model.set_model_attn2_replace(half, "middle", 0)
    results = [tiny.sample(guided(tiny, model=m)) for m in (model, tiny.model)]
    assert not torch.allclose(*results, rtol=1e-3)
    model, before, after = watched(tiny, lambda m: guided(tiny, model=m))
    model.set_model_attn2_replace(half, "middle", 0)
    tiny.sample(model)
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_interrupt_leaves_nothing_behind(tiny: Tiny) -> None:
    plain = tiny.sample(tiny.model)
    model = guided(tiny, checkpointing=True)
    expected = tiny.sample(model)
    calls = 0

    def interrupt(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:  # the gradient's pass of the second step
            raise comfy.model_management.InterruptProcessingException
        return v[:, :1].expand_as(q)

    broken = model.clone()
    broken.set_model_attn2_replace(interrupt, "output", 2)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tiny.sample(broken)
    assert calls == 5
    assert torch.is_inference_mode_enabled()
    assert torch.equal(tiny.sample(tiny.model), plain)
    assert torch.equal(tiny.sample(model), expected)
    tiny.sample(tiny.model)
    unet = tiny.model.model.diffusion_model
    assert not any(getattr(module, "weight_function", ()) for module in unet.modules())


def test_the_node_guides_with_its_defaults(tiny: Tiny) -> None:
    (model,) = execute(CrossAttentionGuidanceNode, model=tiny.model, trajectory=tiny.trajectory)
    result = tiny.sample(model)
    torch.testing.assert_close(result, tiny.sample(guided(tiny, amount=0.1, checkpointing=True)))
    assert not torch.equal(result, tiny.sample(tiny.model))
    (model,) = execute(CrossAttentionGuidanceNode, model=tiny.model, trajectory=tiny.trajectory, latents=TWO)
    torch.testing.assert_close(tiny.sample(model), tiny.sample(guided(tiny, amount=0.1, checkpointing=True, two=True)))


def test_what_cannot_be_guided_is_refused_in_a_sentence(tiny: Tiny) -> None:
    model = guided(tiny)
    with pytest.raises(ValueError, match="already carries a Cross Attention Guidance"):
        guided(tiny, model=model)
    other = invert(tiny.model, Guidance(tiny.source, None, 1.0), tiny.image + 1, tiny.sigmas)
    with pytest.raises(ValueError, match="read from different trajectories"):
        attach(model, other, PNP)
    with pytest.raises(ValueError, match="made with another model"):
        guided(tiny, model=tiny_model(seed=9))
    with pytest.raises(ValueError, match="source has 77 and the sampler's positive 154: make them of one length"):
        tiny.sample(model, positive=conditioning(2, 154))
    with pytest.raises(ValueError, match="Cross Attention Guidance cannot change the latent inside .* 'uni_pc'"):
        tiny.sample(model, sampler="uni_pc")
    with pytest.raises(ValueError, match="no cross-attention that is small enough in this MODEL: raise max_side"):
        tiny.sample(guided(tiny, max_side=1))
    with pytest.raises(ValueError, match="does not start from the trajectory's own noise"):
        tiny.sample(model, noise=tiny.noise.flip(3))
    with pytest.raises(ValueError, match="'euler_ancestral' adds fresh noise"):
        tiny.sample(model, sampler="euler_ancestral")


def test_two_latents_want_a_plain_negative(tiny: Tiny) -> None:
    model = guided(tiny, two=True)
    with pytest.raises(ValueError, match="negative prompt, which this run leaves out: raise cfg, .* or set latents"):
        tiny.sample(model, cfg=1.0)
    embedding = tiny.negative[0][0]
    for options in ({"start_percent": 0.0, "end_percent": 0.5}, {"gligen": ("position", None, [])}):
        with pytest.raises(ValueError, match="takes one plain negative prompt, without .* GLIGEN, timestep ranges"):
            tiny.sample(model, negative=[[embedding, options]])
    with pytest.raises(ValueError, match="takes one plain negative prompt, without .* or a second prompt"):
        tiny.sample(model, negative=[*tiny.negative, *tiny.target])
    mixed = attach_mixture(tiny.model, tiny.negative, Mixture(0.5, CONSTANT))
    with pytest.raises(ValueError, match="takes one plain negative prompt, without Negative Prompt Guidance"):
        tiny.sample(guided(tiny, model=mixed, two=True))


def test_a_patch_that_lengthens_the_prompt_inside_the_model_is_folded_or_refused(tiny: Tiny) -> None:
    def tokens(count: int):
        model = tiny.model.clone()
        model.set_model_attn2_patch(
            lambda q, k, v, options: (q, k.repeat(1, 2, 1)[:, :count], v.repeat(1, 2, 1)[:, :count])
        )
        return guided(tiny, model=model)

    torch.testing.assert_close(tiny.sample(tokens(154)), tiny.sample(guided(tiny)), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="changed the prompt from 77 to 80 tokens"):
        tiny.sample(tokens(80))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_keep_their_numbers(tiny: Tiny, checkpointing: bool) -> None:
    """GLIGEN and others count transformers as the host does, in calls with and without a gradient."""
    seen: dict[str, list[int]] = {"plain": [], "source": [], "target": []}

    def note(n: Tensor, options: dict) -> Tensor:
        kind = "plain" if torch.is_inference_mode_enabled() else "target" if torch.is_grad_enabled() else "source"
        seen[kind].append(options["transformer_index"])
        return n

    model = tiny.model.clone()
    model.set_model_patch(note, "middle_patch")
    tiny.sample(guided(tiny, checkpointing=checkpointing, model=model))
    layers = list(range(len(all_layers(tiny.model.model.diffusion_model))))
    assert seen["plain"] == seen["source"] == layers * tiny.steps
    again = sorted(layers, reverse=True) if checkpointing else []
    assert seen["target"] == (layers + again) * tiny.steps


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_controlnet_of_the_target_guides_too(tiny: Tiny, checkpointing: bool) -> None:
    control, calls = controlnet()
    target = [[tiny.target[0][0], {"control": control, "control_apply_to_uncond": True}]]
    model = guided(tiny, checkpointing=checkpointing)
    result = tiny.sample(model, positive=target)
    assert calls
    assert torch.isfinite(result).all()
    assert not torch.allclose(result, tiny.sample(model), rtol=1e-3)
    assert not torch.allclose(result, tiny.sample(tiny.model, positive=target), rtol=1e-3)


def test_gligen_and_overridden_attention_are_refused(tiny: Tiny) -> None:
    model = tiny.model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda function, *args: function(*args)
    with pytest.raises(ValueError, match="override, but Cross Attention Guidance takes gradients"):
        tiny.sample(guided(tiny, model=model))
    target = [[tiny.target[0][0], {"gligen": ("position", None, [])}]]
    with pytest.raises(ValueError, match="Cross Attention Guidance cannot work through GLIGEN"):
        tiny.sample(guided(tiny), positive=target)
