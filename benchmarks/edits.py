"""Word-swap edits of random demo scenes against their one true answer, by method.

Each scene is rendered, encoded, inverted and edited by a one-word swap of colour, shape or background. Every method is
scored on both sides: the error to the true answer where the edit changes the picture and where it must not, and whether
the picture shows the asked word, read back by `demo.score`.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import NamedTuple

import comfy.samplers
import numpy as np
import torch

from ..attention import alignment
from ..attention.p2p import Window, WordSwap
from ..demo import model as demo_model
from ..demo import scenes, score
from ..host.model import noise_latent
from ..host.source import attach
from ..host.tokens import token_texts
from ..inversion.ddim import leading_sigmas
from ..inversion.run import Guidance, invert, record
from .picture import decode, sample, save_grid

KINDS = ("color", "shape", "background")


class Case(NamedTuple):
    kind: str
    source: scenes.Scene
    target: scenes.Scene


class Score(NamedTuple):
    """Decibels (PSNR to the true answer) where the answer changes and where it does not, and the asked word shown."""

    inside: float
    outside: float
    shown: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--cross", type=float, default=0.8, help="cross_replace of the P2P rows")
    parser.add_argument("--self", dest="self_", type=float, default=0.4, help="self_replace of the P2P rows")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--picture", type=Path, help="where to save source, edits and answers of the first scenes")


def run(arguments: argparse.Namespace) -> None:
    loaded = demo_model.load()
    cases = draw_cases(arguments.scenes, arguments.seed)
    scores: dict[str, list[Score]] = {}
    for first in range(0, len(cases), arguments.batch):
        part = cases[first : first + arguments.batch]
        pictures = edit(loaded, part, arguments)
        for method, images in pictures.items():
            scores.setdefault(method, []).extend(map(measure, images, part))
        if arguments.picture and first == 0:
            before, answer = (np.stack([scenes.render(case[side]) for case in part[:12]]) for side in (1, 2))
            save_grid([before, *(images[:12] for images in pictures.values()), answer], arguments.picture)
    report(scores, cases)


def draw_cases(count: int, seed: int) -> list[Case]:
    """Random scenes of one or two things with a one-word swap each, the kinds in turn."""
    rng = random.Random(seed)
    cases = []
    while len(cases) < count:
        kind = KINDS[len(cases) % len(KINDS)]
        scene = scenes.sample(rng)
        thing = rng.randrange(len(scene.things))
        cases.append(Case(kind, scene, rng.choice(scenes.edits(scene, thing)[kind])))
    return cases


def edit(loaded: tuple, cases: list[Case], arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    """The edited pictures [b, H, W, 3] by method."""
    model, clip, vae = loaded
    source, target = ([encode(clip, [case[side].caption for case in cases])] for side in (1, 2))
    negative = [encode(clip, [""])]
    images = torch.from_numpy(np.stack([scenes.render(case.source) for case in cases]))
    sigmas = leading_sigmas(model.get_model_object("model_sampling").sigmas, arguments.steps)
    mapper = common_mapper(clip, cases)
    swap = WordSwap(mapper, target[0][0], Window(0, arguments.cross), Window(0, arguments.self_), 32**2)
    guided = Guidance(target, negative, arguments.cfg)

    pinned = invert(model, Guidance(source, None, 1.0), vae.encode(images), sigmas)
    noise = noise_latent(model, pinned)
    euler = comfy.samplers.sampler_object("euler")
    drifting, _ = record(
        model, Guidance(source, negative, arguments.cfg), euler, sigmas, torch.zeros_like(noise), noise, seed=0
    )
    latents = {
        "source, resampled at cfg 1": sample(model, Guidance(source, None, 1.0), noise, sigmas),
        "naive: inverted noise, new prompt": sample(model, guided, noise, sigmas),
        "DDIM + P2P": sample(attach(model, drifting, swap), guided, noise, sigmas),
        "Direct Inversion + P2P": sample(attach(model, pinned, swap), guided, noise, sigmas),
    }
    return {method: decode(vae, latent) for method, latent in latents.items()}


def common_mapper(clip, cases: list[Case]) -> torch.Tensor:
    """The one mapper of all cases, which a batch shares; swapped words must have as many tokens as before."""
    for case in cases:
        prompts = [alignment.words(token_texts(clip, clip.tokenize(case[side].caption), "scene")) for side in (1, 2)]
        mapper = alignment.swap_mapper(*prompts)
        if not torch.equal(mapper, torch.eye(len(mapper))):
            raise ValueError(f"'{case.source.caption}' and '{case.target.caption}' cannot share a batch's mapper")
    return mapper


def encode(clip, captions: list[str]) -> list:
    """One CONDITIONING entry for a batch of captions."""
    return [torch.cat([clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0] for text in captions]), {}]


def measure(image: np.ndarray, case: Case) -> Score:
    before, answer = scenes.render(case.source), scenes.render(case.target)
    changed = scenes.changed(before, answer)
    error = ((image - answer) ** 2).mean(-1)
    inside, outside = (float(-10 * np.log10(max(error[where].mean(), 1e-6))) for where in (changed, ~changed))
    return Score(inside, outside, score.judge(image, case.target)[case.kind])


def report(scores: dict[str, list[Score]], cases: list[Case]) -> None:
    """Markdown tables: means by method, then paired differences with standard errors and win counts."""
    print(f"\n{len(cases)} scenes; decibels to the true answer, higher is better\n")
    print("| method | inside the change | outside it | shows the asked word |" + " | ".join(KINDS) + " |")
    print("|---|---|---|---|" + "---|" * len(KINDS))
    for method, rows in scores.items():
        inside, outside, shown = (np.array(values, float) for values in zip(*rows, strict=True))
        kinds = [shown[[case.kind == kind for case in cases]] for kind in KINDS]
        by_kind = " | ".join(f"{int(found.sum())}/{len(found)}" for found in kinds)
        print(f"| {method} | {inside.mean():.1f} | {outside.mean():.1f} | {int(shown.sum())}/{len(rows)} | {by_kind} |")
    print("\n| paired difference | inside, dB | wins | outside, dB | wins |\n|---|---|---|---|---|")
    naive, ddim, direct = list(scores)[1:]
    for better, worse in ((ddim, naive), (direct, naive), (direct, ddim)):
        cells = []
        for field in ("inside", "outside"):
            pairs = zip(scores[better], scores[worse], strict=True)
            gaps = np.array([getattr(one, field) - getattr(other, field) for one, other in pairs])
            error = gaps.std(ddof=1) / len(gaps) ** 0.5
            cells.append(f"{gaps.mean():+.2f} ± {error:.2f} | {int((gaps > 0).sum())}/{len(gaps)}")
        print(f"| {better} − {worse} | {' | '.join(cells)} |")
