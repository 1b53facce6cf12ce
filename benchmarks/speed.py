"""What a step of an edit costs, as ratios within one run: ours, plain sampling, and P2P with materialised maps."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..attention.p2p import Window, WordSwap
from ..demo import model as demo_model
from ..host.model import noise_latent
from ..host.source import attach
from ..inversion.ddim import leading_sigmas
from ..inversion.run import Guidance, invert
from .edits import encode
from .picture import sample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--side", type=int, default=16, help="side of the latent; the demo model's own is 16")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)


def run(arguments: argparse.Namespace) -> None:
    model, clip, _ = demo_model.load()
    sigmas = leading_sigmas(model.get_model_object("model_sampling").sigmas, arguments.steps)
    source, target, negative = ([encode(clip, [text])] for text in ("a red circle", "a red star", ""))
    latent = torch.randn(1, demo_model.UNET["in_channels"], arguments.side, arguments.side)
    trajectory = invert(model, Guidance(source, None, 1.0), latent, sigmas)
    always, mapper = Window(0, 1), torch.eye(target[0][0].shape[1])
    edited = attach(model, trajectory, WordSwap(mapper, target[0][0], always, always, arguments.side**2))
    noise = noise_latent(model, trajectory)
    guided = Guidance(target, negative, 4.0)
    ways: dict[str, tuple[Callable[[], Tensor], int]] = {
        "plain sampling": (lambda: sample(model, guided, noise, sigmas), 2),
        "source branch": (lambda: sample(edited, guided, noise, sigmas), 3),
        "materialised maps": (lambda: sample(materialised(edited), guided, noise, sigmas), 3),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds + 1):  # the first is a warm-up
        for name, (work, _) in ways.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    plain = sorted(seconds["plain sampling"][1:])[arguments.rounds // 2] / 2
    print("| way | rows a step | ms a step | a row, against plain |\n|---|---|---|---|")
    for name, (_, rows) in ways.items():
        median = sorted(seconds[name][1:])[arguments.rounds // 2]
        print(f"| {name} | {rows} | {1000 * median / arguments.steps:.1f} | {median / rows / plain:.2f} |")


def materialised(model):
    """The same rows with every attention map computed and held, as the reference implementations do."""

    def attention(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        q, k, v = (t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
        maps = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return (maps.clone() @ v).transpose(1, 2).flatten(2)

    def replace(executor, x: Tensor, t: Tensor, c_concat, c_crossattn, control, options: dict, **kwargs) -> Tensor:
        blocks = [(name, i) for name in ("input", "middle", "output") for i in range(12)]
        maps = {kind: dict.fromkeys(blocks, attention) for kind in ("attn1", "attn2")}
        return executor(x, t, c_concat, c_crossattn, control, options | {"patches_replace": maps}, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "benchmark.maps", replace)
    return model
