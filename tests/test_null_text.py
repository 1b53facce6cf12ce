"""Null-text inversion: against the algorithm written out in float64, and what its negatives are worth in the host."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.samplers
import comfy.utils
import folder_paths
import nodes
import pytest
import torch
from comfy.model_base import ModelType
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from palimpsest.benchmarks import reconstruction
from palimpsest.benchmarks.edits import encode
from palimpsest.benchmarks.picture import sample
from palimpsest.demo import scenes
from palimpsest.host.branch.source import attach
from palimpsest.host.files.unfinished import Unfinished
from palimpsest.host.run.model import noise_latent
from palimpsest.host.run.timed import timed
from palimpsest.host.unet.gradients import differentiable, gradients
from palimpsest.inversion.ddim import leading_sigmas
from palimpsest.inversion.null_text import Settings, check_pivot, distances, null_text
from palimpsest.inversion.replay import invert_edit_friendly
from palimpsest.inversion.run import Guidance, Refinement, invert
from palimpsest.nodes.inversion import LEADING
from palimpsest.nodes.null_text import EMPTY, SOURCE, NullTextInversion
from reference import in_float64
from test_composition import controlnet
from test_source import swap
from tiny import Tiny, conditioning, execute, rows_of, tiny_model

EPS, V = ModelType.EPS, ModelType.V_PREDICTION
QUICK = Settings(inner_steps=2)
EACH = 1 + QUICK.inner_steps + 1  # evaluations of a step
BEFORE = 3  # calls that tell an unfinished run, and a MODEL that repeats its answers and mixes no prompts


@pytest.fixture(autouse=True)
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return tmp_path / "palimpsest"


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def embeddings(negative: list) -> Tensor:
    return torch.stack([embedding for embedding, _ in negative])


# --- the algorithm ---------------------------------------------------------------------------------------------------


def written_out(tiny: Tiny, start: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Algorithm 1 in z for one image in float64, with Adam by hand: negatives and states as x."""
    with gradients():
        _, eps = in_float64(tiny.model)
        sigmas, pivot = tiny.sigmas.double().clone(), tiny.trajectory.states.double().clone()
        source, null = [[tiny.source[0][0].double().clone(), {}]], start.double().clone()
        signal = (1 + sigmas**2) ** -0.5
        z = pivot[0] * signal[0]
        negatives, states = [], [pivot[0]]
        for i in range(len(sigmas) - 1):
            conditional = eps(z / signal[i], sigmas[i], source, {}).detach()

            def stepped(null: Tensor, i: int = i, z: Tensor = z, conditional: Tensor = conditional) -> Tensor:
                unconditional = eps(z / signal[i], sigmas[i], [[null, {}]], {})
                e = unconditional + settings.cfg * (conditional - unconditional)
                noise, noise_next = sigmas[i] * signal[i], sigmas[i + 1] * signal[i + 1]
                return signal[i + 1] / signal[i] * (z - noise * e) + noise_next * e

            first, second = torch.zeros_like(null), torch.zeros_like(null)
            for j in range(1, settings.inner_steps + 1):
                null.requires_grad_()
                loss = ((stepped(null) - pivot[i + 1] * signal[i + 1]) ** 2).mean()
                if loss < settings.early_stop + 2e-5 * i:
                    break
                (grad,) = torch.autograd.grad(loss, null)
                first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
                rate = settings.learning_rate * (1 - i / 100)
                null = null.detach() - rate * first / (1 - 0.9**j) / ((second / (1 - 0.999**j)).sqrt() + 1e-8)
            null = null.detach()
            z = stepped(null).detach()
            negatives.append(null)
            states.append(z / signal[i + 1])
        return torch.stack(negatives), torch.stack(states)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [EPS, V])
def test_gradients_are_those_of_finite_differences(kind: ModelType, checkpointing: bool) -> None:
    """Along random directions, the host's fp32 network against a float64 copy."""
    model, sigma, where = tiny_model(kind), 3.0, conditioning(1)[0][0]
    generator = torch.Generator().manual_seed(5)
    x, weight = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    with gradients():
        working = differentiable(model, checkpointing)
        comfy.model_management.load_models_gpu([working])
        embedding = where.clone().requires_grad_()
        at, level = x.clone(), torch.tensor([sigma])
        options = {"wrappers": working.wrappers}
        denoised = working.model.apply_model(at, level, c_crossattn=embedding, transformer_options=options)
        (gradient,) = torch.autograd.grad((denoised * weight.clone()).sum(), embedding)
    comfy.model_management.load_models_gpu([model])
    (_, eps), level = in_float64(model), torch.tensor(sigma).double()

    def value(embedding: Tensor) -> Tensor:
        return ((x - sigma * eps(x.double(), level, [[embedding, {}]], {})) * weight).sum()

    for _ in range(3):
        direction = torch.randn(where.shape, generator=generator).double()
        difference = (value(where + 1e-5 * direction) - value(where - 1e-5 * direction)) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "early_stop"),  # never, and in the first step
    [(EPS, 0.0), (EPS, 2.5), (V, 0.0), (V, 0.13)],
)
def test_the_optimisation_is_the_papers(kind: ModelType, early_stop: float) -> None:
    tiny = Tiny(steps=4, model=tiny_model(kind))
    settings = Settings(inner_steps=4, early_stop=early_stop)
    negative, found = null_text(tiny.model, tiny.trajectory, tiny.negative, settings, True)
    negatives, states = written_out(tiny, tiny.negative[0][0], settings)
    start = tiny.negative[0][0]
    assert relative(found.states, states) < 1e-4
    # Adam divides a gradient by its size: where that is nothing but rounding, as for 2 of the 19,712, so is its step.
    errors = (embeddings(negative) - negatives).abs().flatten().sort().values[:-10]
    assert errors.norm() < 2e-4 * (negatives - start).norm()
    assert relative(states, tiny.trajectory.states) > 0.01


def test_each_image_of_a_batch_is_fitted_by_itself() -> None:
    """At an early_stop that the images reach after different numbers of updates."""
    tiny = Tiny(steps=3, batch=2)
    settings = Settings(inner_steps=6, early_stop=3.0)
    updates = []
    negative, found = null_text(tiny.model, tiny.trajectory, tiny.negative, settings, True)
    for image in range(2):
        pivot = tiny.trajectory._replace(states=tiny.trajectory.states[:, image : image + 1])
        counted, rows = rows_of(tiny.model)
        alone, path = null_text(counted, pivot, tiny.negative, settings, True)
        updates.append(len(rows))
        assert relative(found.states[:, image], path.states[:, 0]) < 1e-3
        assert relative(embeddings(negative)[:, image], embeddings(alone)[:, 0]) < 1e-3
    assert updates[0] != updates[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_evaluations(tiny: Tiny, checkpointing: bool) -> None:
    """Those before the first step have two rows; then a step is the source, the updates, and the last look, of one."""
    counted, rows = rows_of(tiny.model)
    null_text(counted, tiny.trajectory, tiny.negative, QUICK, checkpointing)
    assert rows == [2] * BEFORE + tiny.steps * [1] * EACH


def test_a_step_that_is_good_enough_is_left_as_it_is(tiny: Tiny) -> None:
    counted, rows = rows_of(tiny.model)
    settings = QUICK._replace(early_stop=1e9)
    negative, found = null_text(counted, tiny.trajectory, tiny.negative, settings, True)
    assert rows == [2] * BEFORE + tiny.steps * [1] * 2
    assert all(torch.equal(embedding, tiny.negative[0][0]) for embedding, _ in negative)
    plain = tiny.sample(tiny.model, tiny.source, tiny.negative, cfg=settings.cfg)
    assert relative(tiny.model.model.process_latent_out(found.states[-1]), plain) < 1e-4


# --- in the host -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["negative", "source"])
def test_stock_sampling_with_the_negatives_is_the_reconstruction(start: str) -> None:
    """And it comes closer to the images, here two, than a plain negative does."""
    tiny = Tiny(batch=2)
    negative, found = null_text(
        tiny.model, tiny.trajectory, getattr(tiny, start), Settings(inner_steps=5, learning_rate=0.02), True
    )
    out = tiny.model.model.process_latent_out
    assert [len(embedding) for embedding, _ in negative] == [2] * tiny.steps
    ours, plain = (tiny.sample(tiny.model, tiny.source, each, cfg=7.5) for each in (negative, tiny.negative))
    assert relative(ours, out(found.states[-1])) < 1e-4
    for image in range(2):
        assert relative(ours[image], tiny.image[image]) < 0.9 * relative(plain[image], tiny.image[image])


@pytest.mark.parametrize(("start_from", "share"), [(EMPTY, 0.8), (SOURCE, 0.5)])
def test_the_demo_model_reconstructs_a_scene_at_the_papers_guidance(demo: tuple, start_from: str, share: float) -> None:
    """Through the node, in 5 steps of few updates: this share of the error of an empty negative, or less."""
    model, clip, vae = demo
    caption = "a photo of a red car on a street"
    image = vae.encode(torch.from_numpy(scenes.render(scenes.parse(caption, 3)))[None])
    source, empty = ([encode(clip, [text])] for text in (caption, ""))
    sigmas = leading_sigmas(model.get_model_object("model_sampling").sigmas, 5)
    pivot = invert(model, Guidance(source, None, 1.0), image, sigmas)
    negative, found, plot = execute(
        NullTextInversion, model=model, trajectory=pivot, empty=empty, start_from=start_from, inner_steps=6
    )
    noise = noise_latent(model, pivot)
    ours, plain = (sample(model, Guidance(source, each, 7.5), noise, sigmas) for each in (negative, empty))
    assert relative(ours, model.model.process_latent_out(found.states[-1])) < 1e-5
    assert relative(ours, image) < share * relative(plain, image)
    assert plot.shape[0] == 1
    assert plot.shape[3] == 3


@pytest.mark.parametrize("schedule", [LEADING, *comfy.samplers.SCHEDULER_NAMES])
@pytest.mark.parametrize("steps", [2, 5, 30, 50, 100])
def test_one_negative_is_active_at_every_sigma(schedule: str, steps: int) -> None:
    sampling = tiny_model().get_model_object("model_sampling")
    if schedule == LEADING:
        sigmas = leading_sigmas(sampling.sigmas, steps)
    else:
        sigmas = comfy.samplers.calculate_sigmas(sampling, schedule, steps)
    count = len(sigmas) - 1
    conds = [options for _, options in timed(torch.zeros(count, 1, 1, 1), {}, sigmas, sampling.percent_to_sigma)]
    ranges = [
        (sampling.percent_to_sigma(c["start_percent"]), sampling.percent_to_sigma(c["end_percent"])) for c in conds
    ]
    for i, sigma in enumerate(sigmas[:-1].tolist()):
        for shifted in (sigma * (1 - 1e-4), sigma, sigma * (1 + 1e-4)):  # a trajectory's own tolerance
            assert [j for j, (start, end) in enumerate(ranges) if end <= shifted <= start] == [i]


def test_ksampler_advanced_reconstructs_too(tiny: Tiny) -> None:
    """On its own sigmas, worked out anew."""
    sigmas = comfy.samplers.calculate_sigmas(tiny.model.get_model_object("model_sampling"), "ddim_uniform", 5)
    pivot = invert(tiny.model, Guidance(tiny.source, None, 1.0), tiny.image, sigmas)
    negative, found = null_text(tiny.model, pivot, tiny.negative, QUICK, True)
    latent = {"samples": noise_latent(tiny.model, pivot)}
    run = nodes.KSamplerAdvanced().sample
    (result,) = run(
        tiny.model, "disable", 0, 5, 7.5, "euler", "ddim_uniform", tiny.source, negative, latent, 0, 10000, "disable"
    )
    assert relative(result["samples"], tiny.model.model.process_latent_out(found.states[-1])) < 1e-4


def test_all_that_the_prompt_carries_is_kept(tiny: Tiny) -> None:
    pooled = torch.randn(1, 8)
    empty = [[tiny.negative[0][0], {"pooled_output": pooled, "width": 64}]]
    negative, _ = null_text(tiny.model, tiny.trajectory, empty, QUICK, True)
    assert all(torch.equal(options["pooled_output"], pooled) and options["width"] == 64 for _, options in negative)
    assert (negative[0][1]["start_percent"], negative[-1][1]["end_percent"]) == (0.0, 1.0)


def test_an_edit_takes_both_outputs(tiny: Tiny) -> None:
    """A word swap that swaps nothing is the reconstruction, at three rows a step."""
    negative, found = null_text(tiny.model, tiny.trajectory, tiny.negative, QUICK, True)
    counted, rows = rows_of(attach(tiny.model, found, swap(target=tiny.source[0][0])))
    edited = tiny.sample(counted, tiny.source, negative, cfg=QUICK.cfg)
    assert rows == [3] * tiny.steps
    assert relative(edited, tiny.model.model.process_latent_out(found.states[-1])) < 1e-4


def digest(model: ModelPatcher) -> str:
    found = hashlib.sha256()
    for name, tensor in model.model.state_dict().items():
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(("checkpointing", "times"), [(True, 8), (False, 40)])
def test_memory_is_reserved_for_gradients(
    tiny: Tiny, checkpointing: bool, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, needed = comfy.model_management.load_models_gpu, []

    def watch(models: list[ModelPatcher], *, minimum_memory_required: float, **kwargs) -> None:
        needed.append(minimum_memory_required)  # what the host keeps free of weights
        load(models, minimum_memory_required=minimum_memory_required, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watch)
    tiny.sample(tiny.model)
    null_text(tiny.model, tiny.trajectory, tiny.negative, QUICK, checkpointing)
    plain, ours = needed
    assert ours == pytest.approx(times * plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_model_is_as_it_was(dtype: torch.dtype) -> None:
    """Also one whose weights are in half precision, while gradients are taken in full."""
    tiny = Tiny(model=tiny_model())
    tiny.model.model.diffusion_model.to(dtype).dtype = dtype
    before, plain = digest(tiny.model), tiny.sample(tiny.model)
    seen = []

    def watch(executor, x: Tensor, *args, **kwargs):
        seen.append(x.dtype)
        return executor(x, *args, **kwargs)

    watched = tiny.model.clone()
    watched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", watch)
    null_text(watched, tiny.trajectory, tiny.negative, QUICK, True)
    assert set(seen) == {torch.float32}
    assert torch.equal(tiny.sample(tiny.model), plain)
    assert digest(tiny.model) == before
    assert not any(parameter.requires_grad for parameter in tiny.model.model.parameters())


def test_a_lora_on_the_model_counts(tiny: Tiny) -> None:
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    patched = tiny.model.clone()
    patched.add_patches({name: ("diff", (torch.randn(64, 64),))})
    pivot = invert(patched, Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas)
    negative, found = null_text(patched, pivot, tiny.negative, QUICK, True)
    noise, out = tiny.model.model.process_latent_out(pivot.states[0]), tiny.model.model.process_latent_out
    with_it, without = (tiny.sample(m, tiny.source, negative, cfg=7.5, noise=noise) for m in (patched, tiny.model))
    assert relative(with_it, out(found.states[-1])) < 1e-4
    assert relative(without, out(found.states[-1])) > 1e-2


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_controlnet_of_the_source_counts(tiny: Tiny, everywhere: bool) -> None:
    control, calls = controlnet()
    source = [[tiny.source[0][0], {"control": control, "control_apply_to_uncond": everywhere}]]
    pivot = invert(tiny.model, Guidance(source, None, 1.0), tiny.image, tiny.sigmas)
    calls.clear()
    negative, found = null_text(tiny.model, pivot, tiny.negative, QUICK, True)
    assert len(calls) == BEFORE + tiny.steps * (EACH if everywhere else 1)
    noise, out = tiny.model.model.process_latent_out(pivot.states[0]), tiny.model.model.process_latent_out
    again = tiny.sample(tiny.model, source, negative, cfg=7.5, noise=noise)
    assert relative(again, out(found.states[-1])) < 1e-4


def test_the_benchmark_scores_stock_sampling_and_counts_the_optimisation(demo: tuple) -> None:
    """A start that is good enough is left as it is and scores the same bits as its plain negative."""
    part = [scenes.parse("a photo of a red car on a street", 3)]
    images = demo[2].encode(torch.from_numpy(scenes.render(part[0]))[None])
    results = reconstruction.reconstruct(demo, part, images, 2, Settings(inner_steps=1))
    assert [result[1:] for result in results.values()] == [(0, 0), (0, 0), (6 + 2 * 3, 2), (6 + 2 * 3, 2)]
    assert all(result.latents.shape == images.shape for result in results.values())
    kept = reconstruction.reconstruct(demo, part, images, 2, Settings(inner_steps=1, early_stop=1e9))
    for plain, optimised in (
        (reconstruction.DDIM, reconstruction.NULL_TEXT),
        (reconstruction.SOURCE, reconstruction.FROM_SOURCE),
    ):
        assert torch.equal(kept[optimised].latents, kept[plain].latents)


# --- interrupts ------------------------------------------------------------------------------------------------------


def stopping(model: ModelPatcher, after: int) -> ModelPatcher:
    """A clone that is interrupted in the UNet call after so many."""
    calls = iter(range(1 << 20))

    def stop(executor, *args, **kwargs):
        if next(calls) == after:
            raise InterruptProcessingException
        return executor(*args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.stop", stop)
    return model


@pytest.fixture
def interrupted(temp: Path) -> Tiny:
    """In the third of its four steps."""
    tiny = Tiny(steps=4)
    with pytest.raises(InterruptProcessingException):
        null_text(stopping(tiny.model, BEFORE + 2 * EACH + 2), tiny.trajectory, tiny.negative, QUICK, True)
    assert len(list(temp.iterdir())) == 1
    return tiny


def test_a_run_goes_on_where_it_was_interrupted(interrupted: Tiny, temp: Path) -> None:
    tiny = interrupted
    counted, rows = rows_of(tiny.model)
    resumed = null_text(counted, tiny.trajectory, tiny.negative, QUICK, True)
    assert len(rows) == BEFORE + (tiny.steps - 2) * EACH
    assert not list(temp.iterdir())
    rows.clear()
    whole = null_text(counted, tiny.trajectory, tiny.negative, QUICK, True)
    assert len(rows) == BEFORE + tiny.steps * EACH
    assert torch.equal(embeddings(resumed[0]), embeddings(whole[0]))
    assert torch.equal(resumed[1].states, whole[1].states)
    assert not list(temp.iterdir())


def test_what_was_loaded_does_not_hang_on_its_file() -> None:
    """Or the file could not be removed on Windows."""
    kept, values = Unfinished("test", ()), torch.arange(1.0, 9.0)
    kept.save({"values": values})
    loaded = kept.load()["values"]
    with kept.path.open("r+b") as file:
        file.write(bytes(kept.path.stat().st_size))
    assert torch.equal(loaded, values)


@pytest.mark.parametrize("kept", [16, 200, -8], ids=["part of the header", "no tensors", "part of the tensors"])
def test_a_damaged_file_counts_as_none(interrupted: Tiny, temp: Path, kept: int) -> None:
    tiny, (path,) = interrupted, temp.iterdir()
    path.write_bytes(path.read_bytes()[:kept])
    counted, rows = rows_of(tiny.model)
    null_text(counted, tiny.trajectory, tiny.negative, QUICK, True)
    assert len(rows) == BEFORE + tiny.steps * EACH
    assert not list(temp.iterdir())


@pytest.fixture
def no_folder(temp: Path) -> Path:
    """A file in place of the folder: nothing can be kept."""
    temp.write_text("")
    return temp


def test_an_interrupt_stays_one_where_nothing_can_be_kept(
    tiny: Tiny, no_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InterruptProcessingException):
        null_text(stopping(tiny.model, BEFORE + EACH), tiny.trajectory, tiny.negative, QUICK, True)
    assert "cannot keep the finished steps" in caplog.text


def test_a_result_stays_one_where_its_file_cannot_be_removed(
    interrupted: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(f"{path} is in use")

    monkeypatch.setattr(Path, "unlink", refuse)
    negative, _ = null_text(interrupted.model, interrupted.trajectory, interrupted.negative, QUICK, True)
    assert len(negative) == interrupted.steps
    assert "cannot remove" in caplog.text


def test_a_run_of_other_inputs_begins_anew(interrupted: Tiny) -> None:
    tiny = interrupted
    whole = BEFORE + tiny.steps * EACH
    patched = tiny.model.clone()
    patched.set_model_attn2_patch(lambda q, k, v, extra_options: (q, k, 1.001 * v))
    moved = tiny.trajectory._replace(states=tiny.trajectory.states * 1.001)
    other = [[tiny.negative[0][0] * 1.001, {}]]
    for model, pivot, start, settings in (
        (patched, tiny.trajectory, tiny.negative, QUICK),
        (tiny.model, moved, tiny.negative, QUICK),
        (tiny.model, tiny.trajectory, other, QUICK),
        (tiny.model, tiny.trajectory, tiny.negative, QUICK._replace(cfg=7.4)),
        (tiny.model, tiny.trajectory, tiny.negative, QUICK._replace(learning_rate=0.02)),
    ):
        counted, rows = rows_of(model)
        null_text(counted, pivot, start, settings, True)
        assert len(rows) == whole


def test_progress_rises_with_every_update(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the end; the host leaves out what follows too fast."""
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    null_text(tiny.model, tiny.trajectory, tiny.negative, QUICK, True)
    total = tiny.steps * (QUICK.inner_steps + 1)
    assert len(seen) > tiny.steps
    assert sorted(set(seen)) == seen
    assert seen[0] == (1, total)
    assert seen[-1] == (total, total)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refusals(tiny: Tiny) -> None:
    """All before the network is asked anything."""
    counted, rows = rows_of(tiny.model)

    def refused(sentence: str, **changes: object) -> None:
        inputs = {"model": counted, "trajectory": tiny.trajectory, "empty": tiny.negative, "cfg": 7.5} | changes
        with pytest.raises(ValueError, match=sentence):
            execute(NullTextInversion, **inputs)

    def smoothed(function: Callable, q: Tensor, *args, **kwargs) -> Tensor:
        return function(0.5 * q, *args, **kwargs)

    edited = attach(tiny.model, tiny.trajectory, swap())
    guided = tiny.model.clone()
    guided.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    overridden = counted.clone()
    overridden.model_options["transformer_options"]["optimized_attention_override"] = smoothed
    spread = tiny.model.clone()
    spread.set_additional_models("multigpu", [tiny.model])
    embedding = tiny.negative[0][0]
    long = Tiny(steps=101).trajectory
    refused("Null Text Inversion was given a MODEL that is already edited", model=edited)
    refused("carries another node's guidance", model=guided)
    refused("run on one GPU", model=spread)
    refused("carries another node's attention override, but Null Text Inversion takes gradients", model=overridden)
    refused("made with another model", model=tiny_model(seed=9))
    refused("at cfg 1 has nothing to optimise", cfg=1.0)
    refused("at most 100", trajectory=long)
    refused("has 2 entries", empty=tiny.negative * 2)
    refused("has 0 entries", empty=[])
    refused("has embeddings of 32 channels but the prompt beside it has 64", empty=[[embedding[..., :32], {}]])
    refused("carries 'start_percent'", empty=[[embedding, {"start_percent": 0.5}]])
    gligen = [[tiny.source[0][0], {"gligen": ("position", None, [])}]]
    refused("cannot work through GLIGEN", trajectory=tiny.trajectory._replace(conditioning=gligen))
    for start_from in (EMPTY, SOURCE):
        masked = [[tiny.source[0][0], {"mask": torch.ones(1, 8, 8)}]]
        spoilt = tiny.trajectory._replace(conditioning=masked)
        refused("source conditioning carries 'mask'", trajectory=spoilt, start_from=start_from)
        refused("The empty prompt of Null Text Inversion carries 'mask'", empty=masked, start_from=start_from)
    refused("source conditioning has 2 entries", trajectory=tiny.trajectory._replace(conditioning=tiny.source * 2))
    assert not rows


@pytest.mark.parametrize("kind", [EPS, V])
@pytest.mark.parametrize(("steps", "skipped"), [(10, 0), (20, 0), (20, 7)])
def test_a_trajectory_of_independent_noises_is_refused(kind: ModelType, steps: int, skipped: int) -> None:
    """That of Edit Friendly Inversion, also in one image of a batch; after two evaluations."""
    tiny = Tiny(steps=steps, model=tiny_model(kind), batch=2)
    tiny.sigmas = tiny.sigmas[skipped:]
    guidance = Guidance(tiny.source, None, 1.0)
    pivot, _ = invert_edit_friendly(tiny.model, guidance, tiny.image, tiny.sigmas, 1.0, seed=0)
    plain = invert(tiny.model, guidance, tiny.image, tiny.sigmas).states
    mixed = pivot._replace(states=torch.stack((plain[:, 0], pivot.states[:, 1]), 1))
    counted, rows = rows_of(tiny.model)
    for trajectory in (pivot, mixed):
        with pytest.raises(ValueError, match="connect the trajectory of DDIM Inversion at cfg 1"):
            execute(NullTextInversion, model=counted, trajectory=trajectory, empty=tiny.negative)
    assert rows == [2] * 4


@pytest.mark.parametrize("kind", [EPS, V])
@pytest.mark.parametrize("steps", [1, 5, 10, 20])
@pytest.mark.parametrize("refinement", [Refinement(), Refinement(3, 2)])
def test_inversions_are_pivots(kind: ModelType, steps: int, refinement: Refinement) -> None:
    tiny = Tiny(steps=1, model=tiny_model(kind))
    sampling = tiny.model.get_model_object("model_sampling")
    for sigmas in leading_sigmas(sampling.sigmas, steps), comfy.samplers.calculate_sigmas(sampling, "karras", steps):
        pivot = invert(tiny.model, Guidance(tiny.source, None, 1.0), tiny.image, sigmas, refinement)
        check_pivot(tiny.model, pivot)


@pytest.mark.parametrize(("calls", "step"), [(BEFORE + 2, 1), (BEFORE + EACH + 3, 2)])
def test_an_update_that_ends_in_nan_is_refused_at_once(tiny: Tiny, calls: int, step: int) -> None:
    """After the first update, and in the last look at a step, where no loss is taken any more."""
    counted, rows = rows_of(tiny.model)

    def overflow(executor, *args, **kwargs) -> Tensor:
        return executor(*args, **kwargs) * (float("nan") if len(rows) > calls else 1.0)

    counted.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.nan", overflow)
    with pytest.raises(ValueError, match=f"NaN or infinite values in step {step} of 5, with learning_rate 0.03"):
        null_text(counted, tiny.trajectory, tiny.negative, QUICK._replace(learning_rate=0.03), True)
    assert len(rows) == calls + 1


def test_distances_are_those_of_z(tiny: Tiny) -> None:
    moved = tiny.trajectory._replace(states=tiny.trajectory.states + 2)
    expected = 2 / (1 + tiny.sigmas**2).sqrt()
    torch.testing.assert_close(distances(moved, tiny.trajectory), expected[None])
