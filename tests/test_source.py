"""The source branch: who rides along when, what the target reads, and that nothing is left behind."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import partial

import comfy.controlnet
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.k_diffusion import sampling as k_diffusion
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import KSAMPLER, Sampler
from comfy_extras.nodes_custom_sampler import SamplerER_SDE, SamplerSASolver
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from torch import Tensor

from palimpsest.attention.alignment import Carry
from palimpsest.attention.p2p import PromptToPrompt, Window
from palimpsest.host.branch.source import attach
from palimpsest.host.layer import Inputs, Layer, Read
from palimpsest.inversion.run import Guidance, invert, record
from palimpsest.nodes.store import RecordAttention
from reference import classic_p2p, swapped
from tiny import Tiny, conditioning, execute, rows_of, tiny_model

ALWAYS, NEVER = Window(0, 1), Window(0, 0)
IDENTITY = torch.eye(77)


def swap(
    mapper: Tensor = IDENTITY,
    cross: Window = ALWAYS,
    self_: Window = ALWAYS,
    side: int = 32,
    target: Tensor | None = None,
) -> PromptToPrompt:
    """A word swap, or any linear edit of the map, of all tokens at once."""
    target = conditioning(2, mapper.shape[1])[0][0] if target is None else target
    none = torch.zeros(target.shape[:2])
    carry = Carry(mapper.expand(len(target), -1, -1), none)
    windows = torch.stack([none + cross.start, none + cross.end])
    return PromptToPrompt(carry, target, none + 1, windows, self_, side**2)


def some_mapper(source: int = 77, target: int = 77) -> Tensor:
    """A random row-stochastic matrix: any linear edit of the map."""
    return torch.rand(source, target, generator=torch.Generator().manual_seed(5)).softmax(-1)


class Probe:
    """An edit that changes nothing and keeps what it was offered."""

    node, everyone, features = "Probe", False, ()

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds or ("self", "cross")
        self.seen: list[tuple[Layer, Inputs, Inputs]] = []

    def check(self, positive: Tensor, batch: int) -> None:
        pass

    def at(self, fraction: float) -> Probe:
        return self

    def wants(self, layer: Layer) -> bool:
        return layer.kind in self.kinds

    def read(self, layer: Layer, source: Inputs, target: Inputs) -> tuple[Read, ...]:
        self.seen.append((layer, source, target))
        return (Read(target),)


@pytest.mark.parametrize(("cross", "self_"), [(4, 2), (5, 0), (0, 5)])
def test_target_equals_the_classic_pair(tiny: Tiny, cross: int, self_: int) -> None:
    mapper = some_mapper()
    model = attach(tiny.model, tiny.trajectory, swap(mapper, Window(0, cross / 5), Window(0, self_ / 5)))
    ours = tiny.model.model.process_latent_in(tiny.sample(model))
    theirs = classic_p2p(tiny, swapped(mapper, cross), self_, cfg=4.0)
    plain = tiny.model.model.process_latent_in(tiny.sample(tiny.model))
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    assert (plain - theirs).norm() > 1e-3 * theirs.norm()  # the edit does something here


class Control(comfy.controlnet.ControlBase):
    """A ControlNet that adds nothing and keeps the chunks that it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.chunks: list[list[int]] = []

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.chunks.append(transformer_options["cond_or_uncond"])

    def get_models(self) -> list:
        return []

    def pre_run(self, model, percent_to_timestep_function) -> None:
        pass


@pytest.mark.parametrize("options", [{}, {"control_apply_to_uncond": True}])
def test_a_controlnet_on_the_target_stays_off_the_source(tiny: Tiny, options: dict) -> None:
    """The source then runs in a call of its own, before the target, and the result is that of the joint call."""
    control = Control()
    model = attach(tiny.model, tiny.trajectory, swap(some_mapper()))
    together = tiny.sample(model)
    apart = tiny.sample(model, positive=[[tiny.target[0][0], {"control": control, **options}]])
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-3)
    assert len(control.chunks) == 5
    assert all(2 not in chunks for chunks in control.chunks)


def test_inversion_runs_with_a_controlnet(tiny: Tiny) -> None:
    control = Control()
    source = [[tiny.source[0][0], {"control": control, "control_apply_to_uncond": True}]]
    trajectory = invert(tiny.model, Guidance(source, None, 1.0), tiny.image, tiny.sigmas)
    assert torch.equal(trajectory.states, tiny.trajectory.states)
    control.chunks.clear()
    edited = tiny.sample(attach(tiny.model, trajectory, swap(some_mapper())))
    assert control.chunks == [[2]] * 5
    plain = tiny.sample(attach(tiny.model, tiny.trajectory, swap(some_mapper())))
    torch.testing.assert_close(edited, plain, rtol=1e-3, atol=1e-3)


def test_other_packs_see_conditional_and_unconditional_rows_only(tiny: Tiny) -> None:
    """IPAdapter and others pick from a pair by these numbers, inside the model."""
    seen = set()

    def attn2(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        seen.update(options["cond_or_uncond"])
        assert len(options["cond_or_uncond"]) == len(q)
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, options["n_heads"])

    model = tiny.model.clone()
    model.set_model_attn2_replace(attn2, "middle", 0)
    with_it = tiny.sample(attach(model, tiny.trajectory, swap(some_mapper())))
    without = tiny.sample(attach(tiny.model, tiny.trajectory, swap(some_mapper())))
    assert seen == {0, 1}
    torch.testing.assert_close(with_it, without, rtol=1e-3, atol=1e-3)


def test_edits_see_whole_layers_under_hypertile(tiny: Tiny) -> None:
    """A pack that cuts self-attention into tiles works on the rows that the edit has made, not the other way round."""
    tiles = []

    def watch(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        tiles.append(len(q))
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, options["n_heads"])

    model = HyperTile.execute(tiny.model, 32, 1, 0, False)[0]
    model.set_model_attn1_replace(watch, "input", 1)
    probe = Probe()
    tiny.sample(attach(model, tiny.trajectory, probe))
    assert set(tiles) == {3 * 4}
    layers = {layer for layer, _, _ in probe.seen if layer[:3] == ("self", "input", 1)}
    assert {layer.positions for layer in layers} == {64}
    assert all(len(target.query) == 1 for _, _, target in probe.seen)


def test_inversion_refuses_guidance_patches(tiny: Tiny) -> None:
    model = PerturbedAttentionGuidance.execute(tiny.model, 3.0).result[0]
    with pytest.raises(ValueError, match="carries another node's guidance"):
        invert(model, Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas)
    with pytest.raises(ValueError, match="to invert or record carries another node's guidance"):
        execute(RecordAttention, model=model, trajectory=tiny.trajectory)
    result = tiny.sample(attach(model, tiny.trajectory, swap(some_mapper())))
    assert not torch.equal(result, tiny.sample(attach(tiny.model, tiny.trajectory, swap(some_mapper()))))


def test_rows_per_step_are_three_while_an_edit_is_active(tiny: Tiny) -> None:
    model, rows = rows_of(tiny.model)
    tiny.sample(attach(model, tiny.trajectory, swap(cross=Window(0, 0.6), self_=Window(0, 0.2))))
    assert rows == [3, 3, 3, 2, 2]
    rows.clear()
    tiny.sample(attach(model, tiny.trajectory, swap(cross=Window(0, 0.6))), cfg=1.0)
    assert rows == [2] * 5


def test_rows_of_a_batch() -> None:
    tiny = Tiny(batch=2)
    model, rows = rows_of(tiny.model)
    tiny.sample(attach(model, tiny.trajectory, swap()))
    assert rows == [6] * 5


def test_several_targets_from_one_source(tiny: Tiny) -> None:
    targets = torch.cat([conditioning(seed)[0][0] for seed in (2, 6)])
    model = attach(tiny.model, tiny.trajectory, swap(some_mapper(), target=targets))
    both = tiny.sample(model, positive=[[targets, {}]], noise=tiny.noise.repeat(2, 1, 1, 1))
    for target, result in zip(targets[:, None], both, strict=True):
        alone = attach(tiny.model, tiny.trajectory, swap(some_mapper(), target=target))
        alone = tiny.sample(alone, positive=[[target, {}]])
        torch.testing.assert_close(result[None], alone, rtol=1e-3, atol=1e-3)


def test_the_source_row_is_the_trajectory_exactly(tiny: Tiny) -> None:
    seen = []

    def watch(executor, x: Tensor, t: Tensor, *args, **kwargs):
        seen.append(x[args[3]["palimpsest.chunks"].index(2)].clone())
        return executor(x, t, *args, **kwargs)

    model = attach(tiny.model, tiny.trajectory, swap())
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test.watch", watch)  # runs inside ours
    tiny.sample(model)
    assert torch.equal(torch.stack(seen), tiny.trajectory.states[:-1, 0])


def split(monkeypatch: pytest.MonkeyPatch, tiny: Tiny) -> None:
    monkeypatch.setattr(type(tiny.model), "get_free_memory", lambda self, device: 0)


def test_split_calls_give_the_same_target(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = rows_of(attach(tiny.model, tiny.trajectory, swap(some_mapper(), Window(0, 0.8), Window(0, 0.4))))
    together = tiny.sample(model)
    split(monkeypatch, tiny)
    rows.clear()
    apart = tiny.sample(model)
    assert rows == [1] * 14
    assert (together - apart).abs().max() < 1e-4 * together.abs().max()


@pytest.mark.parametrize("no_memory", [False, True])
@pytest.mark.parametrize(
    ("source", "target", "negative"),
    [(77, 77, 154), (154, 77, 77), (77, 154, 77), (77, 154, 231), (385, 385, 77), (77, 385, 77)],
)
def test_unequal_token_counts(
    source: int, target: int, negative: int, no_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host tiles contexts to a common length, up to four times; the edit must see the prompts' own tokens."""
    tiny = Tiny(source=conditioning(1, source), target=conditioning(2, target), negative=conditioning(3, negative))
    model = attach(tiny.model, tiny.trajectory, swap(some_mapper(source, target), self_=NEVER))
    if no_memory:
        split(monkeypatch, tiny)
    ours = tiny.sample(model, cfg=4.0)
    theirs = tiny.model.model.process_latent_out(classic_p2p(tiny, swapped(some_mapper(source, target), 5), 0, cfg=4.0))
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_no_op_settings_equal_the_plain_sampler_bit_for_bit(tiny: Tiny) -> None:
    plain = tiny.sample(tiny.model)
    assert torch.equal(tiny.sample(attach(tiny.model, tiny.trajectory, swap(cross=NEVER, self_=NEVER))), plain)
    # With the source beside it the target only reads: another batch size may round differently, no more.
    probed = tiny.sample(attach(tiny.model, tiny.trajectory, Probe()))
    assert (probed - plain).abs().max() < 1e-4 * plain.abs().max()


def test_requeueing_gives_the_same_bits_and_clones_stay_clean(tiny: Tiny) -> None:
    before = tiny.sample(tiny.model)
    model = attach(tiny.model, tiny.trajectory, swap(some_mapper()))
    first, second = tiny.sample(model), tiny.sample(model)
    assert torch.equal(first, second)
    assert not torch.equal(first, before)
    assert torch.equal(tiny.sample(tiny.model), before)
    assert torch.equal(tiny.sample(model.clone()), first)


def test_a_run_in_two_parts_equals_one(tiny: Tiny) -> None:
    """KSampler Advanced may stop at a step and go on from there: schedules are fractions of the whole trajectory."""
    model = attach(tiny.model, tiny.trajectory, swap(some_mapper(), Window(0, 0.8), Window(0, 0.4)))
    first = tiny.sample(model, sigmas=tiny.sigmas[:4])
    torch.testing.assert_close(
        tiny.sample(model, sigmas=tiny.sigmas[3:], noise=first), tiny.sample(model), rtol=1e-3, atol=1e-3
    )


def test_two_edits_share_one_branch(tiny: Tiny) -> None:
    counted, rows = rows_of(tiny.model)
    probe = Probe("self")
    both = attach(attach(counted, tiny.trajectory, swap(some_mapper(), self_=NEVER)), tiny.trajectory, probe)
    result = tiny.sample(both)
    assert rows == [3] * 5
    assert probe.seen
    assert torch.equal(result, tiny.sample(attach(tiny.model, tiny.trajectory, swap(some_mapper(), self_=NEVER))))
    with pytest.raises(ValueError, match="already carries a P2P Attention Controller"):
        attach(both, tiny.trajectory, swap())
    with pytest.raises(ValueError, match="Attention Controller and Probe on this MODEL both replace the cross-att"):
        tiny.sample(attach(attach(tiny.model, tiny.trajectory, swap()), tiny.trajectory, Probe("cross")))


def test_edit_sees_every_attention_layer_once(tiny: Tiny) -> None:
    probe = Probe()
    tiny.sample(attach(tiny.model, tiny.trajectory, probe))
    layers = [layer for layer, _, _ in probe.seen]
    assert len(set(layers)) == 2 * 7
    assert len(layers) == 5 * 2 * 7
    assert {layer.positions for layer in layers} == {64, 16}


def test_resolution_limit(tiny: Tiny) -> None:
    limited = swap(side=4).at(0.0)
    assert limited.wants(Layer("self", "middle", 0, 0, 4, 4))
    assert not limited.wants(Layer("self", "input", 1, 0, 8, 8))
    assert limited.wants(Layer("cross", "input", 1, 0, 8, 8))


def test_an_interrupt_leaves_nothing_behind(tiny: Tiny) -> None:
    before = tiny.sample(tiny.model)
    calls = 0

    def interrupt(executor, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise comfy.model_management.InterruptProcessingException
        return executor(*args, **kwargs)

    model = attach(tiny.model, tiny.trajectory, swap())
    broken = model.clone()
    broken.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.interrupt", interrupt)
    expected = tiny.sample(model)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tiny.sample(broken)
    assert torch.equal(tiny.sample(tiny.model), before)
    assert torch.equal(tiny.sample(model), expected)


def host_symbols() -> dict[str, str]:
    """Every function and class of the host modules that sampling goes through, by identity and source."""
    modules = [comfy.samplers, comfy.ldm.modules.attention, comfy.model_management, comfy.model_patcher]
    modules += [comfy.model_base, comfy.sampler_helpers, comfy.patcher_extension]
    symbols = {}
    for module in modules:
        for name, value in vars(module).items():
            if inspect.isclass(value):
                members = sorted((k, id(v)) for k, v in vars(value).items() if callable(v))
                symbols[f"{module.__name__}.{name}"] = hashlib.sha256(repr(members).encode()).hexdigest()
            elif callable(value):
                symbols[f"{module.__name__}.{name}"] = str(id(value))
    return symbols


def test_host_symbols_stay_what_they_are(tiny: Tiny) -> None:
    before = host_symbols()
    tiny.sample(attach(tiny.model, tiny.trajectory, swap()))
    assert host_symbols() == before


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m", "lms", "uni_pc", "deis", "ipndm", "res_multistep"])
def test_deterministic_samplers_work(tiny: Tiny, sampler: str) -> None:
    plain = tiny.sample(tiny.model, sampler=sampler)
    probed = tiny.sample(attach(tiny.model, tiny.trajectory, Probe()), sampler=sampler)
    edited = tiny.sample(attach(tiny.model, tiny.trajectory, swap(some_mapper())), sampler=sampler)
    assert (probed - plain).norm() < 1e-3 * plain.norm()
    assert (edited - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize(
    "sampler", ["euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "ddpm", "lcm", "er_sde", "sa_solver"]
)
def test_noisy_samplers_are_refused(tiny: Tiny, sampler: str) -> None:
    with pytest.raises(ValueError, match=f"'{sampler}' adds fresh noise"):
        tiny.sample(attach(tiny.model, tiny.trajectory, swap()), sampler=sampler)


class Wrapped:
    """A sampler function in an object, as other packs have them."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, model, x: Tensor, sigmas: Tensor, extra_args: dict, callback, disable) -> Tensor:
        return self.function(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable)


@pytest.mark.parametrize("wrap", [partial, Wrapped])
def test_samplers_of_other_packs_need_no_name(tiny: Tiny, wrap: Callable) -> None:
    model = attach(tiny.model, tiny.trajectory, swap())
    wrapped = tiny.sample(model, sampler=KSAMPLER(wrap(k_diffusion.sample_euler)))
    assert torch.equal(wrapped, tiny.sample(model, sampler="euler"))
    with pytest.raises(ValueError, match="'euler_ancestral' adds fresh noise"):
        tiny.sample(model, sampler=KSAMPLER(partial(k_diffusion.sample_euler_ancestral)))


def sampler(kind: str, model: ModelPatcher) -> Sampler:
    if kind in comfy.samplers.SAMPLER_NAMES:
        return comfy.samplers.sampler_object(kind)
    solver, _, setting = kind.partition(": ")
    if solver == "ER-SDE":
        return SamplerER_SDE.execute(*{"ODE": ("ODE", 3, 1, 1), "eta 0": ("Reverse-time SDE", 3, 0, 1)}[setting])[0]
    eta, start, end = {"eta 0": (0, 0.2, 0.8), "eta 1": (1, 0.2, 0.8), "no steps": (1, 0.8, 0.8)}[setting]
    return SamplerSASolver.execute(model, eta, start, end, 1.0, 3, 4, False, False)[0]


@pytest.mark.parametrize(
    "kind",
    [name for name in comfy.samplers.SAMPLER_NAMES if name not in ("dpm_2", "dpm_fast", "dpm_adaptive")]
    + ["ER-SDE: ODE", "ER-SDE: eta 0", "SA-Solver: eta 0", "SA-Solver: eta 1", "SA-Solver: no steps"],
)
def test_samplers_are_called_noisy_where_another_seed_gives_another_image(kind: str) -> None:
    tiny = Tiny(steps=3)
    chosen = sampler(kind, tiny.model)
    one, other = (tiny.sample(tiny.model, sampler=chosen, seed=seed) for seed in (0, 1))
    model = attach(tiny.model, tiny.trajectory, Probe())
    if torch.equal(one, other):
        assert (tiny.sample(model, sampler=chosen) - one).norm() < 1e-3 * one.norm()
    else:
        with pytest.raises(ValueError, match="adds fresh noise"):
            tiny.sample(model, sampler=chosen)


def test_samplers_that_leave_the_schedule_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="asks for sigma .* does not hold"):
        tiny.sample(attach(tiny.model, tiny.trajectory, swap()), sampler="dpm_fast")


def test_wrong_runs_are_refused_in_a_sentence(tiny: Tiny) -> None:
    model = attach(tiny.model, tiny.trajectory, swap())
    with pytest.raises(ValueError, match="schedule has sigma .* trajectory of 5 steps"):
        tiny.sample(model, sigmas=Tiny(steps=4).sigmas)
    with pytest.raises(ValueError, match="does not start from the trajectory's own noise"):
        tiny.sample(model, noise=tiny.noise.flip(-1))
    with pytest.raises(ValueError, match="starts at step 2 but from the noise of step 0"):
        tiny.sample(model, sigmas=tiny.sigmas[2:])
    with pytest.raises(ValueError, match=r"latent has shape \[1, 4, 16, 8\]"):
        tiny.sample(model, noise=torch.zeros(1, 4, 16, 8))
    two = [*tiny.target, *tiny.target]
    with pytest.raises(ValueError, match="has 2 positive conditionings"):
        tiny.sample(model, positive=two)
    area = {"area": (4, 4, 0, 0), "strength": 1.0}
    with pytest.raises(ValueError, match="The positive prompt is limited to an area"):
        tiny.sample(model, positive=[[tiny.target[0][0], area]])
    with pytest.raises(ValueError, match="The negative prompt is limited to an area"):
        tiny.sample(model, negative=[[tiny.negative[0][0], area]])
    with pytest.raises(ValueError, match="limited to a part of the run"):
        tiny.sample(model, positive=[[tiny.target[0][0], {"start_percent": 0.0, "end_percent": 0.5}]])
    for stranger in (conditioning(7), conditioning(2, 154)):
        with pytest.raises(ValueError, match="positive is not the target prompt of this edit"):
            tiny.sample(model, positive=stranger)
    with pytest.raises(ValueError, match="carries a noise mask"):
        tiny.sample(model, noise_mask=torch.ones(1, 8, 8))
    model.set_additional_models("multigpu", [tiny.model.clone()])
    with pytest.raises(ValueError, match="on one GPU"):
        tiny.sample(model)


def test_calls_on_a_part_of_the_image_are_refused(tiny: Tiny) -> None:
    def tiled(apply_model, arguments: dict) -> Tensor:
        halves = arguments["input"].chunk(2, -1)
        return torch.cat([apply_model(half, arguments["timestep"], **arguments["c"]) for half in halves], -1)

    model = attach(tiny.model, tiny.trajectory, swap())
    model.set_model_unet_function_wrapper(tiled)
    with pytest.raises(ValueError, match="called on a part"):
        tiny.sample(model)


def test_wrong_trajectories_are_refused_in_a_sentence(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="made with another model"):
        attach(tiny_model(seed=9), tiny.trajectory, swap())
    other = tiny.trajectory._replace(states=tiny.trajectory.states + 1)
    with pytest.raises(ValueError, match="different trajectories"):
        attach(attach(tiny.model, tiny.trajectory, swap()), other, swap())
    ranged = tiny.trajectory._replace(conditioning=[[tiny.source[0][0], {"end_percent": 0.5}]])
    with pytest.raises(ValueError, match="carries 'end_percent'"):
        attach(tiny.model, ranged, swap())
    combined = tiny.trajectory._replace(conditioning=[*tiny.source, *tiny.source])
    with pytest.raises(ValueError, match="has 2 entries"):
        attach(tiny.model, combined, swap())


@pytest.mark.parametrize("sampler", ["euler", "lms", "dpmpp_2m"])
def test_recording_keeps_the_run_and_changes_nothing(tiny: Tiny, sampler: str) -> None:
    guidance = Guidance(tiny.source, tiny.negative, 3.0)
    sampler_object = comfy.samplers.sampler_object(sampler)
    noise = torch.randn_like(tiny.noise)
    start = torch.zeros_like(noise)
    trajectory, image = record(tiny.model, guidance, sampler_object, tiny.sigmas, noise, start, seed=0)
    plain = guidance.guider(tiny.model).sample(noise, start, sampler_object, tiny.sigmas, disable_pbar=True, seed=0)
    assert torch.equal(image, plain)
    torch.testing.assert_close(tiny.model.model.process_latent_out(trajectory.states[-1]), image)
    # A target that reads its own recording, at its own prompt and guidance, gives the same image.
    again = tiny.sample(
        attach(tiny.model, trajectory, swap(target=tiny.source[0][0])),
        positive=tiny.source,
        cfg=3.0,
        sampler=sampler,
        noise=tiny.model.model.process_latent_out(trajectory.states[0]),
    )
    torch.testing.assert_close(again, image, rtol=1e-3, atol=1e-3)


def test_recording_refuses_noisy_samplers(tiny: Tiny) -> None:
    guidance = Guidance(tiny.source, tiny.negative, 3.0)
    sampler = comfy.samplers.sampler_object("euler_ancestral")
    with pytest.raises(ValueError, match="'euler_ancestral' adds fresh noise"):
        record(tiny.model, guidance, sampler, tiny.sigmas, tiny.noise, tiny.noise, seed=0)
