"""Edits beside nodes that leave out calls of the model, or replay compiled ones: the same edit, or one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import sampler_object
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from torch import Tensor

from flows import FLOWS
from palimpsest.attention.p2p import Window
from palimpsest.guidance.cross_attention import CrossAttentionGuidance
from palimpsest.guidance.negative_prompt import CONSTANT, LINEAR, Mixture
from palimpsest.guidance.proximal import Proximal
from palimpsest.host.branch.guide import attach_guide
from palimpsest.host.branch.guided import attach_rule
from palimpsest.host.branch.negatives import attach_mixture
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.inversion.flow_edit import edit_image
from palimpsest.inversion.null_text import Settings, null_text
from palimpsest.inversion.replay import invert_edict, invert_edit_friendly, invert_obelm
from palimpsest.inversion.run import Guidance, invert, record, resample
from palimpsest.inversion.virtual import invert_virtually, schedule
from test_composition import TOKENS, blend, close, controlnet, edit, stored
from test_flow_edit import Parts
from test_source import split
from tiny import Tiny, conditioning, rows_of

STEPS = 20
Node = Callable[[ModelPatcher], ModelPatcher]


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    with torch.inference_mode():
        return Tiny(steps=STEPS)


def easy(model: ModelPatcher) -> ModelPatcher:
    return EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False).result[0]


def lazy(model: ModelPatcher) -> ModelPatcher:
    return LazyCacheNode.execute(model, 0.2, 0.15, 0.95, False).result[0]


each_cache = pytest.mark.parametrize("cache", [easy, lazy])

# --- caches ----------------------------------------------------------------------------------------------------------


def edited(model: ModelPatcher, tiny: Tiny, kind: str = "swap", **inputs) -> ModelPatcher:
    return attach(model, tiny.trajectory, edit(kind), **inputs)


def ending(model: ModelPatcher, tiny: Tiny) -> ModelPatcher:
    """Edited until half way."""
    half = torch.stack([torch.zeros(1, TOKENS), torch.full((1, TOKENS), 0.5)])
    return attach(model, tiny.trajectory, replace(edit("swap"), cross=half, self_=Window(0, 0.5)))


def with_store(model: ModelPatcher, tiny: Tiny) -> ModelPatcher:
    return edited(model, tiny, store=stored(tiny.model, tiny))


def blended(model: ModelPatcher, tiny: Tiny) -> ModelPatcher:
    return attach_blend(model, tiny.trajectory, blend(4))


def guided(model: ModelPatcher, tiny: Tiny, two_latents: bool = False, amount: float = 0.1) -> ModelPatcher:
    return attach_guide(model, tiny.trajectory, CrossAttentionGuidance(amount, 1.0, 64, two_latents), True)


def mixed(model: ModelPatcher, tiny: Tiny) -> ModelPatcher:
    return attach_mixture(edited(model, tiny), conditioning(9), Mixture(1.0, LINEAR))


def from_source(model: ModelPatcher, tiny: Tiny) -> ModelPatcher:
    return attach_mixture(edited(model, tiny), conditioning(9), Mixture(0.0, CONSTANT), tiny.trajectory)


def proximal(model: ModelPatcher, tiny: Tiny) -> ModelPatcher:
    return attach_rule(edited(model, tiny), Proximal(0.5, 0.1, 0.5, "reconstruction"), tiny.trajectory)


def two(tiny: Tiny) -> dict:
    return {"noise": tiny.noise.repeat(2, 1, 1, 1)}


def controlled(tiny: Tiny) -> dict:
    options = {"control": controlnet()[0], "control_apply_to_uncond": False}
    return {"positive": [[tiny.target[0][0], options]]}


class Form(NamedTuple):
    """An edit and its sampling, and the rows of a step: those of calls that a cache may leave out, and of others.

    rows: None where they change during the run.
    """

    node: Callable[[ModelPatcher, Tiny], ModelPatcher]
    rows: tuple[int, int] | None
    inputs: Callable[[Tiny], dict] = lambda tiny: {}


FORMS = {
    "none": Form(lambda model, tiny: model, (2, 0)),
    "swap": Form(edited, (3, 0)),
    "refine": Form(lambda model, tiny: edited(model, tiny, "refine"), (3, 0)),
    "pnp": Form(lambda model, tiny: edited(model, tiny, "pnp"), (3, 0)),
    "masactrl": Form(lambda model, tiny: edited(model, tiny, "masactrl"), (3, 0)),
    "store": Form(with_store, (2, 0)),
    "two targets": Form(edited, (4, 1), two),
    "controlnet": Form(edited, (2, 1), controlled),
    "blend": Form(lambda model, tiny: blended(edited(model, tiny), tiny), (3, 0)),
    "blend first": Form(lambda model, tiny: edited(blended(model, tiny), tiny), (3, 0)),
    "blend, store": Form(lambda model, tiny: blended(with_store(model, tiny), tiny), (2, 0)),
    "blend, two targets": Form(lambda model, tiny: blended(edited(model, tiny), tiny), (4, 1), two),
    "guidance": Form(guided, (2, 2)),
    "guidance, two latents": Form(lambda model, tiny: guided(model, tiny, True), (2, 4)),
    "guidance, blend": Form(lambda model, tiny: guided(blended(edited(model, tiny), tiny), tiny), (3, 2)),
    "source as negative": Form(from_source, (3, 0)),
    "negative coming in": Form(mixed, None),
    "proximal": Form(proximal, (3, 0)),
    "ending": Form(ending, None),
    "ending, two targets": Form(ending, None, two),
    "ending, controlnet": Form(ending, None, controlled),
}


class Cached:
    """Samples each form once beside each cache, in both orders."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny
        self.done: dict[tuple, tuple[Tensor, int, int]] = {}

    def __call__(
        self, form: str, cache: Node, log: pytest.LogCaptureFixture, first: bool = False
    ) -> tuple[Tensor, int, int]:
        """The sample, the steps left out, and the rows that were run."""
        if (form, cache, first) not in self.done:
            node, _, inputs = FORMS[form]
            model = node(cache(self.tiny.model), self.tiny) if first else cache(node(self.tiny.model, self.tiny))
            model, rows = rows_of(model)
            log.clear()
            with log.at_level("INFO"):
                sample = self.tiny.sample(model, **inputs(self.tiny))
            (skipped,) = re.findall(r"Cache - skipped (\d+)/20 steps", log.text)
            self.done[form, cache, first] = sample, int(skipped), sum(rows)
        return self.done[form, cache, first]


@pytest.fixture(scope="module")
def cached(tiny: Tiny) -> Cached:
    with torch.inference_mode():
        return Cached(tiny)


@each_cache
@pytest.mark.parametrize("form", FORMS)
def test_an_edit_is_cached_as_often_as_plain_sampling(
    cached: Cached, form: str, cache: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """In either order of the nodes. What a cache leaves out depends on the image, so one step more or less may be."""
    sample, skipped, rows = cached(form, cache, caplog)
    other, skipped_too, rows_too = cached(form, cache, caplog, first=True)
    assert close(other, sample)
    assert (skipped_too, rows_too) == (skipped, rows)
    _, plain, _ = cached("none", cache, caplog)
    assert plain >= STEPS * 0.4
    assert abs(skipped - plain) <= (2 if "controlnet" in form else 1)
    if (expected := FORMS[form].rows) is not None:
        cacheable, others = expected
        # EasyCache decides in the target's call, when the source's own is done.
        always = STEPS if cache is easy or "guidance" in form else STEPS - skipped
        asked = 4 if "two latents" in form else 0  # once, whether another node mixes prompts
        assert rows == cacheable * (STEPS - skipped) + others * always + asked


@each_cache
@pytest.mark.parametrize(
    ("form", "same"),
    [
        ("two targets", "swap"),
        ("store", "swap"),
        ("blend first", "blend"),
        ("blend, two targets", "blend, store"),
        ("ending, two targets", "ending"),
    ],
)
def test_a_cached_edit_does_not_depend_on_where_the_source_runs(
    cached: Cached, form: str, same: str, cache: Node, caplog: pytest.LogCaptureFixture
) -> None:
    sample, wanted = (cached(name, cache, caplog)[0] for name in (form, same))
    assert close(sample, wanted.expand_as(sample))


@each_cache
@pytest.mark.parametrize("form", ["blend", "blend, two targets", "guidance, blend"])
def test_a_cached_local_blend_keeps_the_source(
    cached: Cached, form: str, cache: Node, caplog: pytest.LogCaptureFixture
) -> None:
    sample, *_ = cached(form, cache, caplog)
    image = cached.tiny.image.expand_as(sample)
    torch.testing.assert_close(sample[..., 4:], image[..., 4:])
    assert not close(sample[..., :4], image[..., :4])


def test_a_cache_stops_with_no_source_that_runs_alone(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where memory is short the host runs the source first, on which a cache would then depend."""
    split(monkeypatch, tiny)
    counts = []
    for node in (lambda model: model, lambda model: ending(model, tiny)):
        caplog.clear()
        with caplog.at_level("INFO"):
            tiny.sample(easy(node(tiny.model)))
        counts += map(int, re.findall(r"Cache - skipped (\d+)/20 steps", caplog.text))
    plain, edited = counts
    assert abs(edited - plain) <= 1


def test_another_cache_that_leaves_out_the_source_is_refused(tiny: Tiny) -> None:
    """EasyCache's way under another name: a prompt that it has seen before is not run again."""
    seen = set()

    def skip(executor, x: Tensor, timesteps: Tensor, context: Tensor, y, control, options: dict, **kwargs) -> Tensor:
        if len(options["uuids"]) == 1 and options["uuids"][0] in seen:
            return torch.zeros_like(x)
        seen.update(options["uuids"])
        return executor(x, timesteps, context, y, control, options, **kwargs)

    model = edited(tiny.model, tiny)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.skip", skip)
    with pytest.raises(ValueError, match="left out the call of the source, which the edit reads from"):
        tiny.sample(model, **two(tiny))


def edict(model: ModelPatcher, sampled: ModelPatcher, tiny: Tiny) -> None:
    trajectory, sampler = invert_edict(model, Guidance(tiny.source, tiny.negative, 3.0), tiny.image, tiny.sigmas, 0.93)
    noise = tiny.model.model.process_latent_out(trajectory.states[0])
    tiny.sample(sampled, sampler=sampler, noise=noise)


def edit_friendly(model: ModelPatcher, sampled: ModelPatcher, tiny: Tiny) -> None:
    guidance = Guidance(tiny.source, tiny.negative, 3.0)
    trajectory, sampler = invert_edit_friendly(model, guidance, tiny.image, tiny.sigmas, 1.0, 0)
    noise = tiny.model.model.process_latent_out(trajectory.states[0])
    tiny.sample(sampled, sampler=sampler, noise=noise)


def o_belm(model: ModelPatcher, sampled: ModelPatcher, tiny: Tiny) -> None:
    trajectory, sampler = invert_obelm(model, Guidance(tiny.source, tiny.negative, 3.0), tiny.image, tiny.sigmas)
    noise = tiny.model.model.process_latent_out(trajectory.states[0])
    tiny.sample(sampled, sampler=sampler, noise=noise)


NEEDING: dict[str, Callable[[ModelPatcher, Tiny], object]] = {
    "DDIM Inversion": lambda model, tiny: invert(model, Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas),
    "Edit Friendly Inversion": lambda model, tiny: edit_friendly(model, tiny.model, tiny),
    "The sampler of Edit Friendly Inversion": lambda model, tiny: edit_friendly(tiny.model, model, tiny),
    "EDICT Inversion": lambda model, tiny: edict(model, tiny.model, tiny),
    "The sampler of EDICT Inversion": lambda model, tiny: edict(tiny.model, model, tiny),
    "OBELM Inversion": lambda model, tiny: o_belm(model, tiny.model, tiny),
    "The sampler of OBELM Inversion": lambda model, tiny: o_belm(tiny.model, model, tiny),
    "Record Attention": stored,
    "Record Trajectory": lambda model, tiny: record(
        model, Guidance(tiny.source, None, 1.0), sampler_object("euler"), tiny.sigmas, tiny.noise, tiny.noise, 0
    ),
    "Null Text Inversion": lambda model, tiny: null_text(model, tiny.trajectory, tiny.negative, Settings(3.0), True),
}


@each_cache
@pytest.mark.parametrize("name", NEEDING)
def test_what_needs_every_call_refuses_caches(tiny: Tiny, name: str, cache: Node) -> None:
    model, rows = rows_of(cache(tiny.model))
    node = {easy: "EasyCache", lazy: "LazyCache"}[cache]
    with pytest.raises(ValueError, match=f"^{name} needs every answer of the model, but {node} leaves some out"):
        NEEDING[name](model, tiny)
    assert not rows


# --- compilers -------------------------------------------------------------------------------------------------------


def compiled(model: ModelPatcher) -> ModelPatcher:
    """As Torch Compile Model does, with a backend that runs the captured calls as they are."""
    model = model.clone(disable_dynamic=True)
    set_torch_compile_wrapper(model, "eager", options={"guard_filter_fn": skip_torch_compile_dict})
    return model


@pytest.fixture
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.parametrize("first", ["masactrl", "none"])
def test_edits_are_the_same_whatever_was_compiled_before(first: str) -> None:
    """The compiled code belongs to the checkpoint, not to the MODEL that carries an edit."""
    tiny = Tiny()

    def node(model: ModelPatcher, kind: str) -> ModelPatcher:
        return model if kind == "none" else edited(model, tiny, kind)

    plain, compiled_plain = tiny.sample(tiny.model), []
    for kind in (first, "pnp", "masactrl", "none"):
        wanted = tiny.sample(node(tiny.model, kind))
        assert kind == "none" or not close(wanted, plain)
        for model in (compiled(node(tiny.model, kind)), node(compiled(tiny.model), kind)):
            sample = tiny.sample(model)
            assert close(sample, wanted)
            compiled_plain += [sample] if kind == "none" else []
    assert all(torch.equal(sample, compiled_plain[0]) for sample in compiled_plain)
    strong = {"tiny": tiny, "amount": 1.0}
    assert close(tiny.sample(compiled(guided(tiny.model, **strong))), tiny.sample(guided(tiny.model, **strong)))
    recorded, wanted = stored(compiled(tiny.model), tiny), stored(tiny.model, tiny)
    assert recorded.layers == wanted.layers
    assert all(close(*maps) for maps in zip(recorded.maps, wanted.maps, strict=True))


class Counted:
    """A backend that runs the captured calls as they are, and counts them."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.parametrize("first", ["virtual", "plain"])
def test_an_edit_that_reads_nothing_inside_runs_compiled(first: str) -> None:
    """Virtual Inversion on a compiled MODEL, whichever MODEL of the checkpoint the code was made for; others do not."""
    tiny, backend = Tiny(), Counted()
    options = {"guard_filter_fn": skip_torch_compile_dict}

    def compiled(model: ModelPatcher) -> ModelPatcher:
        model = model.clone(disable_dynamic=True)
        set_torch_compile_wrapper(model, backend, options=options)
        return model

    def virtual(model: ModelPatcher, reading: bool) -> Tensor:
        model, trajectory = invert_virtually(model, tiny.source, tiny.image, schedule(model, "simple", 4, 0.6), True)
        if reading:
            model = attach(model, trajectory, edit("masactrl"))
        return resample(model, trajectory, Guidance(tiny.target, tiny.negative, 3.0), sampler_object("euler"))

    runs = {
        "virtual": (lambda model: virtual(model, False), 4),
        "plain": (tiny.sample, tiny.steps),
        "reading": (lambda model: virtual(model, True), 0),
    }
    wanted = {name: run(tiny.model) for name, (run, _) in runs.items()}
    assert not close(wanted["virtual"], wanted["reading"])
    for name in (first, *runs, first):
        run, calls = runs[name]
        backend.runs = 0
        assert torch.equal(run(compiled(tiny.model)), wanted[name])
        assert backend.runs == calls


@pytest.mark.usefixtures("_nothing_compiled")
def test_a_flow_models_edit_that_reads_nothing_inside_runs_compiled() -> None:
    parts, backend = Parts(FLOWS["Flux"]), Counted()
    wanted = parts.sample(edit_image(parts.model, parts.source, parts.image))
    model = parts.model.clone(disable_dynamic=True)
    set_torch_compile_wrapper(model, backend, options={"guard_filter_fn": skip_torch_compile_dict})
    assert torch.equal(parts.sample(edit_image(model, parts.source, parts.image)), wanted)
    assert backend.runs > 0
