"""What a step of Prompt-to-Prompt costs against plain sampling of as many rows, and against P2P with attention maps.

A UNet of true shape and random weights samples in fp32 on the CPU. "Live" runs the source's row beside the target's,
"stored" an attention store in its place; "materialised" edits explicit softmax maps, as the public implementations do.
All attention layers are edited at all steps. Ratios are of processor time, which other work on the machine disturbs
less, and medians over rounds in which every form takes its turn.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import comfy.model_patcher
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..attention.alignment import carry_over
from ..attention.p2p import PromptToPrompt, Window
from ..attention.record import Recording, record_attention
from ..host.branch.source import attach
from ..host.files.trajectory import Trajectory
from ..host.run.model import identity
from ..host.words import END, START, Words, words
from ..inversion.ddim import leading_sigmas
from .architectures import CONFIGS, UNETS

SIZES = {"sd15": 64, "sdxl": 128}
TARGETS = {"swap": "a photo of a dog", "refine": "a photo of a sleeping cat"}
SOURCE = "a photo of a cat"
TOKENS = 77
WIDEST_HEAD = 160  # channels
CFG = 7.5
ALWAYS = Window(0, 1)
CPU = torch.device("cpu")
CLEAR_REFS = Path("/proc/self/clear_refs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=SIZES, default="sd15")
    parser.add_argument("--edit", choices=TARGETS, nargs="+", default=list(TARGETS))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, help="side of the latent, a multiple of 8; else the model's own")
    parser.add_argument("--repeat", type=int, default=3, help="rounds that count; one more warms up")


def run(arguments: argparse.Namespace) -> None:
    if not CLEAR_REFS.exists():
        sys.exit("bench p2p: peak memory is read from Linux's /proc, which this system lacks")
    size = arguments.size or SIZES[arguments.model]
    bench = Bench(random_model(arguments.model), size, arguments.steps)
    forms = bench.forms(arguments.edit)
    watched = {name: Watch.during(work, map_shapes(size)) for name, work in forms.items()}
    rows = {}
    measures: dict[str, list[Measure]] = {name: [] for name in forms}
    for _ in range(arguments.repeat):
        for name, work in forms.items():
            bench.rows.clear()
            measures[name].append(measure(work))
            rows[name] = max(bench.rows)
    print(f"\n{arguments.model}, latent {size} x {size}, {arguments.steps} steps, {arguments.repeat} rounds, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    report(measures, watched, rows, arguments.steps)
    for edit in arguments.edit:
        live, stored, maps = (measures[f"{edit}, {way}"][-1].result for way in ("live", "stored", "materialised"))
        apart = [float((one - maps).norm() / maps.norm()) for one in (live, stored)]
        print(f"\n{edit}: live ends {apart[0]:.0e} from materialised, stored {apart[1]:.0e}")


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The parts that all forms share."""

    model: ModelPatcher
    size: int
    steps: int
    rows: list[int] = field(default_factory=list)  # of every UNet call

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        width = self.model.model.model_config.unet_config["context_dim"]
        self.source, self.target, self.negative = (random_prompt(width, generator) for _ in range(3))
        self.sigmas = leading_sigmas(self.model.get_model_object("model_sampling").sigmas, self.steps)
        noise = torch.randn(self.steps + 1, 1, 4, self.size, self.size, generator=generator)
        states = noise * (1 + self.sigmas**2).sqrt().view(-1, 1, 1, 1, 1)
        self.trajectory = Trajectory(states, self.sigmas, self.source, identity(self.model))
        self.model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "benchmark.rows", self._count)

    def _count(self, executor, x: Tensor, *args, **kwargs) -> Tensor:
        self.rows.append(len(x))
        return executor(x, *args, **kwargs)

    def forms(self, edits: list[str]) -> dict[str, Callable[[], Tensor]]:
        recording = Recording(ALWAYS, ALWAYS, self.size**2, sys.maxsize, torch.float32, CPU)
        store = record_attention(self.model, self.trajectory, recording)
        forms = {"plain, 2 rows": self.sampling(self.model), "plain, 3 rows": self.sampling(self.model, self.source)}
        for name in edits:
            edit = self.edit(name)
            live = attach(self.model, self.trajectory, edit)
            stored = attach(self.model, self.trajectory, edit, store)
            forms[f"{name}, live"] = self.sampling(live)
            forms[f"{name}, stored"] = self.sampling(stored)
            maps = materialised(self.model, self.trajectory, edit)
            forms[f"{name}, materialised"] = self.sampling(maps, self.source)
        return forms

    def edit(self, name: str) -> PromptToPrompt:
        carry = carry_over(some_words(SOURCE), some_words(TARGETS[name]), name)
        carry = carry._replace(source=carry.source[None], own=carry.own[None])
        ones = torch.ones_like(carry.own)
        return PromptToPrompt(carry, self.target[0][0], ones, torch.stack([0 * ones, ones]), ALWAYS, self.size**2)

    def sampling(self, model: ModelPatcher, third: list | None = None) -> Callable[[], Tensor]:
        conds = {"positive": self.target, "negative": self.negative}
        guider = ThreeRows(model) if third else comfy.samplers.CFGGuider(model)
        guider.inner_set_conds(conds | {"third": third} if third else conds)
        guider.set_cfg(CFG)
        noise = self.model.model.process_latent_out(self.trajectory.states[0])
        euler = comfy.samplers.sampler_object("euler")
        none = torch.zeros_like(noise)
        return lambda: guider.sample(none, noise, euler, self.sigmas, disable_pbar=True, seed=0)


class ThreeRows(comfy.samplers.CFGGuider):
    """Classifier-free guidance with a third row that it does not use. Rows are third, negative, positive."""

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict, seed: int | None = None) -> Tensor:
        conds = [self.conds[name] for name in ("positive", "negative", "third")]
        positive, negative, _ = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        return negative + self.cfg * (positive - negative)


def materialised(model: ModelPatcher, trajectory: Trajectory, edit: PromptToPrompt) -> ModelPatcher:
    """`model` for `ThreeRows`, its third row the source, with Prompt-to-Prompt on explicit maps."""
    of_source, of_target = edit.tables(0.0)

    def attention(kind: str) -> Callable[[Tensor, Tensor, Tensor, dict], Tensor]:
        def attend(query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
            query, key, value = (t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (query, key, value))
            maps = (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1)
            source, _, target = maps
            maps[2] = source if kind == "self" else source @ of_source[0] + target * of_target[0]
            return (maps @ value).transpose(1, 2).flatten(2)

        return attend

    blocks = [(name, i) for name in ("input", "middle", "output") for i in range(12)]
    replace = {name: dict.fromkeys(blocks, attention(kind)) for name, kind in (("attn1", "self"), ("attn2", "cross"))}

    def edited(executor, x: Tensor, t: Tensor, c_concat, c_crossattn, control, options: dict, **kwargs) -> Tensor:
        x = x.clone()
        x[0] = trajectory.states[trajectory.index(float(t[0]))][0]
        return executor(x, t, c_concat, c_crossattn, control, options | {"patches_replace": replace}, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "benchmark.maps", edited)
    return model


class Roomy(comfy.model_patcher.CoreModelPatcher):
    """Runs all rows in one call, as the forms assume, however much memory the host thinks there is."""

    def get_free_memory(self, device: torch.device) -> int:
        return sys.maxsize


def random_model(kind: str) -> ModelPatcher:
    """The UNet of "sd15" or "sdxl", random within what keeps activations finite."""
    config = CONFIGS[kind](UNETS[kind])
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=CPU)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.diffusion_model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.5 * parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(name.endswith("weight"))
    return Roomy(model, load_device=CPU, offload_device=CPU)


def random_prompt(width: int, generator: torch.Generator) -> list:
    """CONDITIONING; the pooled embedding is SDXL's, SD1.5 does not look at it."""
    embedding = torch.randn(1, TOKENS, width, generator=generator)
    return [[embedding, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]


def some_words(text: str) -> Words:
    pieces = [START, *(word + "</w>" for word in text.split())]
    return words([pieces + [END] * (TOKENS - len(pieces))])


# --- measuring -------------------------------------------------------------------------------------------------------


class Measure(NamedTuple):
    seconds: float
    processor: float  # seconds of all threads
    peak: int  # bytes that the process held at most, over those that it held before
    result: Tensor


def measure(work: Callable[[], Tensor]) -> Measure:
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide the peak
    CLEAR_REFS.write_text("5")  # lowers the high-water mark to what is held now
    before, start, busy = held_bytes("VmRSS"), time.perf_counter(), time.process_time()
    result = work()
    seconds, processor = time.perf_counter() - start, time.process_time() - busy
    return Measure(seconds, processor, held_bytes("VmHWM") - before, result)


def held_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Watch(TorchDispatchMode):
    """Sees every tensor that an operation returns: the largest attention map, and the kernels that attend."""

    def __init__(self, shapes: set[tuple[int, int]]) -> None:
        super().__init__()
        self.shapes = shapes
        self.largest = 0
        self.kernels: set[str] = set()

    @classmethod
    def during(cls, work: Callable[[], Tensor], shapes: set[tuple[int, int]]) -> Watch:
        with cls(shapes) as watch:
            work()
        return watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # inference mode hands over whole composites, such as attention: look inside
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if "attention" in name or "softmax" in name:
            self.kernels.add(name)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tuple(tensor.shape[-2:]) in self.shapes:
                self.largest = max(self.largest, tensor.nbytes)
        return result


def map_shapes(size: int) -> set[tuple[int, int]]:
    """The last two dimensions of attention maps, without self-attention's that feature maps or heads may have too."""
    positions = {(size >> level) ** 2 for level in range(4)}
    return {(n, TOKENS) for n in positions} | {(n, n) for n in positions if n > max(size, WIDEST_HEAD)}


def report(measures: dict[str, list[Measure]], watched: dict[str, Watch], rows: dict[str, int], steps: int) -> None:
    """A Markdown table; a ratio is to the plain form of as many rows in the same round."""
    print("| form | rows | s a step | a row, against plain | peak, MB | largest map, MB | attention kernels |")
    print("|---|---|---|---|---|---|---|")
    for name, taken in measures.items():
        plain = measures[f"plain, {rows[name]} rows"]
        ratios = [one.processor / other.processor for one, other in zip(taken, plain, strict=True)]
        seconds, peak = statistics.median(one.seconds for one in taken), statistics.median(one.peak for one in taken)
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        kernels = ", ".join(sorted(watched[name].kernels))
        sizes = f"{peak / 1e6:.0f} | {watched[name].largest / 1e6:.1f}"
        print(f"| {name} | {rows[name]} | {seconds / steps:.2f} | {ratio} | {sizes} | {kernels} |")
