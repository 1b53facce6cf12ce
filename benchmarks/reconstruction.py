"""How well guided sampling gives an inverted demo scene back, by negative, and what that costs.

Each scene is rendered, encoded and inverted at guidance 1; then it is sampled at the edit's guidance with the source
prompt as positive. Scored are the latent and the decoded picture, against those of the source itself.
"""

from __future__ import annotations

import argparse
import random
from typing import NamedTuple

import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..demo import model as demo_model
from ..demo import scenes
from ..host.run.model import noise_latent
from ..inversion.ddim import leading_sigmas
from ..inversion.null_text import Settings, null_text
from ..inversion.run import Guidance, invert
from .edits import encode
from .picture import decode, sample

DDIM, SOURCE = "DDIM: empty negative", "negative-prompt inversion: source as negative"
NULL_TEXT, FROM_SOURCE = "null text, from the empty prompt", "null text, from the source prompt"


class Result(NamedTuple):
    """Reconstructed latents [b, c, h, w], and the rows that the network ran to find the negative.

    Inversion and sampling are not counted, as they are the same for all.
    """

    latents: Tensor
    forward: int
    gradients: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1, help="above 1 an image waits for the slowest of its batch")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg", type=float, default=7.5)
    parser.add_argument("--inner", type=int, default=10, help="updates a step at most")
    parser.add_argument("--seed", type=int, default=2026)


def run(arguments: argparse.Namespace) -> None:
    loaded = demo_model.load()
    rng = random.Random(arguments.seed)
    drawn = [scenes.sample(rng) for _ in range(arguments.scenes)]
    settings = Settings(cfg=arguments.cfg, inner_steps=arguments.inner)
    results: dict[str, list[tuple[Tensor, Result]]] = {}
    for first in range(0, len(drawn), arguments.batch):
        part = drawn[first : first + arguments.batch]
        images = loaded[2].encode(torch.from_numpy(np.stack([scenes.render(scene) for scene in part])))
        for method, result in reconstruct(loaded, part, images, arguments.steps, settings).items():
            results.setdefault(method, []).append((images, result))
    report(loaded[2], results, arguments)


def reconstruct(
    loaded: tuple, part: list[scenes.Scene], images: Tensor, steps: int, settings: Settings
) -> dict[str, Result]:
    """By method, of scenes whose latents are `images`."""
    model, clip, _ = loaded
    source, empty = [encode(clip, [scene.caption for scene in part])], [encode(clip, [""])]
    sigmas = leading_sigmas(model.get_model_object("model_sampling").sigmas, steps)
    pivot = invert(model, Guidance(source, None, 1.0), images, sigmas)
    noise = noise_latent(model, pivot)

    def result(negative: list, forward: int = 0, gradients: int = 0) -> Result:
        """As the host's sampler gives it with this negative."""
        return Result(sample(model, Guidance(source, negative, settings.cfg), noise, sigmas), forward, gradients)

    def optimised(start: list) -> Result:
        counting, forward, gradients = counted(model)
        negative, _ = null_text(counting, pivot, start, settings, checkpointing=True)
        return result(negative, sum(forward), sum(gradients))

    return {
        DDIM: result(empty),
        SOURCE: result(source),
        NULL_TEXT: optimised(empty),
        FROM_SOURCE: optimised(source),
    }


def counted(model: ModelPatcher) -> tuple[ModelPatcher, list[int], list[int]]:
    """A clone of `model`, and lists that get the rows of every call of the network and of every gradient."""
    forward, gradients = [], []

    def watch(executor, x: Tensor, *args, **kwargs):
        forward.append(len(x))
        output = executor(x, *args, **kwargs)
        if output.requires_grad:
            output.register_hook(lambda gradient: gradients.append(len(gradient)))
        return output

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "palimpsest.benchmark", watch)
    return model, forward, gradients


def report(vae, results: dict[str, list[tuple[Tensor, Result]]], arguments: argparse.Namespace) -> None:
    """A Markdown table: means over scenes with standard errors, evaluations of the network an image before sampling."""
    steps, inner, count = arguments.steps, arguments.inner, arguments.scenes
    print(f"\n{count} scenes, {steps} steps, cfg {arguments.cfg:g}, at most {inner} updates a step\n")
    print("| negative | picture, dB | latent, mean squared error | evaluations before sampling | gradients |")
    print("|---|---|---|---|---|")
    for method, parts in results.items():
        errors = torch.cat([(result.latents - images).square().flatten(1).mean(1) for images, result in parts])
        pairs = [(decode(vae, result.latents), decode(vae, images)) for images, result in parts]
        decibels = np.concatenate([-10 * np.log10(((one - other) ** 2).mean((1, 2, 3))) for one, other in pairs])
        runs = [sum(getattr(result, kind) for _, result in parts) / count for kind in ("forward", "gradients")]
        picture, latent = mean(decibels, ".2f"), mean(errors.numpy(), ".5f")
        print(f"| {method} | {picture} | {latent} | {steps + runs[0]:.0f} | {runs[1]:.0f} |")
    most = steps + steps * (1 + inner + 2)
    print(f"\nThe authors' code: at most {most} evaluations before sampling and {steps * inner} gradients an image.")


def mean(values: np.ndarray, form: str) -> str:
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{values.mean():{form}} ± {error:{form}}"
