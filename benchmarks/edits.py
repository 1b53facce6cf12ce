"""Edits of random demo scenes against their one true answer, by method.

Each scene is rendered, encoded, inverted and edited in one of the kinds of `demo.edits`: words are swapped for as many
others, or they are added, left out or swapped for more or fewer, which Prompt-to-Prompt calls refinement. Every method
is scored on both sides: the error to the true answer where the edit changes the picture and where it must not, and
whether the picture shows what was asked for, read back by `demo.score`.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import comfy.samplers
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..attention.alignment import Carry, PromptEdit
from ..attention.local_blend import LocalBlend
from ..attention.masactrl import MasaCtrl
from ..attention.p2p import PromptToPrompt, Settings, Window
from ..attention.phrases import changed_columns
from ..attention.pnp import PlugAndPlay
from ..demo import edits as demo_edits
from ..demo import model as demo_model
from ..demo import scenes, score
from ..demo.edits import Edit
from ..guidance.cross_attention import CrossAttentionGuidance
from ..guidance.direction import Embedded, apply, direction_between
from ..host.branch.blocks import last_layers
from ..host.branch.guide import attach_guide
from ..host.branch.source import attach, attach_blend
from ..host.run.model import noise_latent
from ..host.run.tokens import prompt_words
from ..host.unet.tree import decoder_from_second
from ..inversion.ddim import leading_sigmas
from ..inversion.run import Guidance, invert, record
from .picture import decode, sample, save_grid

SENTENCES = 40  # a side, of an edit direction
KINDS = {
    "swap": ("object", "colour", "material", "background", "style"),
    "refine": ("add", "delete", "content", "pose", "background"),
}
DIRECT, BLENDED, WEIGHED = "Direct Inversion + P2P", "the same + Local Blend", "the same, the word weighed 2"
WEIGHED_BLENDED = f"{WEIGHED} + Local Blend"
RESAMPLED = "source, resampled at cfg 1"
NAIVE, DRIFTING = "naive: inverted noise, new prompt", "DDIM + P2P"
DRIFTING_PNP, DIRECT_PNP = "DDIM + PnP", "Direct Inversion + PnP"
DRIFTING_MASACTRL, DIRECT_MASACTRL = "DDIM + MasaCtrl", "Direct Inversion + MasaCtrl"
DIRECTION, GUIDED = "pix2pix-zero direction", "pix2pix-zero direction + guidance"
TWO_LATENTS = f"{GUIDED} with two latents"
METHODS = (RESAMPLED, NAIVE, DRIFTING, DIRECT, BLENDED, WEIGHED, WEIGHED_BLENDED)
METHODS += (DRIFTING_PNP, DIRECT_PNP, DRIFTING_MASACTRL, DIRECT_MASACTRL, DIRECTION, GUIDED, TWO_LATENTS)
COMPARED = [(DRIFTING, NAIVE), (DIRECT, NAIVE), (DIRECT, DRIFTING)]
COMPARED += [(better, DIRECT) for better in (BLENDED, WEIGHED, WEIGHED_BLENDED)]
COMPARED += [(DIRECT_PNP, NAIVE), (DIRECT_PNP, DRIFTING_PNP)]
COMPARED += [(DIRECT_MASACTRL, NAIVE), (DIRECT_MASACTRL, DRIFTING_MASACTRL)]
COMPARED += [(DIRECTION, NAIVE), (GUIDED, NAIVE), (GUIDED, DIRECTION), (TWO_LATENTS, GUIDED)]


class Score(NamedTuple):
    """Decibels (PSNR to the true answer) where the answer changes and where it does not, and the asked words shown."""

    inside: float
    outside: float
    shown: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--edit", choices=tuple(KINDS), default="swap")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--cross", type=float, default=0.8, help="cross_replace of the P2P rows")
    parser.add_argument("--self", dest="self_", type=float, default=0.4, help="self_replace of the P2P rows")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="methods whose names hold one of these; else all")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--picture", type=Path, help="where to save source, edits and answers of the first scenes")


def run(arguments: argparse.Namespace) -> None:
    loaded = demo_model.load()
    cases = draw_cases(arguments.edit, arguments.scenes, arguments.seed)
    chosen = [name for name in METHODS if any(text in name for text in arguments.only or [""])]
    scores: dict[str, list[Score]] = {}
    for first in range(0, len(cases), arguments.batch):
        part = cases[first : first + arguments.batch]
        pictures = edit(loaded, part, arguments, chosen)
        for method, images in pictures.items():
            scores.setdefault(method, []).extend(map(measure, images, part))
        if arguments.picture and first == 0:
            before, answer = (np.stack([scenes.render(scene) for scene in side[:12]]) for side in sides(part))
            save_grid([before, *(images[:12] for images in pictures.values()), answer], arguments.picture)
    report(scores, cases)


def draw_cases(edit: str, count: int, seed: int) -> list[Edit]:
    """Random scenes of one or two things with an edit of each kind in turn, of captions of equal length or not."""
    rng = random.Random(seed)
    cases: list[Edit] = []
    while len(cases) < count:
        case = demo_edits.draw(rng, KINDS[edit][len(cases) % len(KINDS[edit])])
        if is_swap(case) == (edit == "swap"):
            cases.append(case)
    return cases


def is_swap(case: Edit) -> bool:
    return all(len(before.split()) == len(after.split()) for before, after in case.words)


def sides(cases: Sequence[Edit]) -> tuple[list[scenes.Scene], list[scenes.Scene]]:
    """The scenes before and after the edits."""
    return [case.source for case in cases], [case.target for case in cases]


def edit(
    loaded: tuple, cases: Sequence[Edit], arguments: argparse.Namespace, methods: Collection[str]
) -> dict[str, np.ndarray]:
    """The edited pictures [b, H, W, 3] by method."""
    model, clip, vae = loaded
    source, target = ([encode(clip, [scene.caption for scene in side])] for side in sides(cases))
    negative = [encode(clip, [""])]
    images = torch.from_numpy(np.stack([scenes.render(case.source) for case in cases]))
    sigmas = leading_sigmas(model.get_model_object("model_sampling").sigmas, arguments.steps)
    guided = Guidance(target, negative, arguments.cfg)
    edits = [prompt_edit(clip, case, arguments.edit) for case in cases]
    p2p, weighed = (prompt_to_prompt(edits, weight, arguments) for weight in (1.0, 2.0))
    blend = local_blend(edits)
    decoder = decoder_from_second(model.model.diffusion_model)
    pnp = PlugAndPlay(tuple(decoder[:1]), tuple(decoder), 0.8, 0.5)
    masactrl = MasaCtrl(last_layers(model.model.diffusion_model, -1), 0.08, False, None)

    pinned = invert(model, Guidance(source, None, 1.0), vae.encode(images), sigmas)
    noise = noise_latent(model, pinned)
    euler = comfy.samplers.sampler_object("euler")
    drifting, _ = record(
        model, Guidance(source, negative, arguments.cfg), euler, sigmas, torch.zeros_like(noise), noise, seed=0
    )
    models = {
        NAIVE: model,
        DRIFTING: attach(model, drifting, p2p),
        DIRECT: attach(model, pinned, p2p),
        BLENDED: attach_blend(attach(model, pinned, p2p), pinned, blend),
        WEIGHED: attach(model, pinned, weighed),
        WEIGHED_BLENDED: attach_blend(attach(model, pinned, weighed), pinned, blend),
        DRIFTING_PNP: attach(model, drifting, pnp),
        DIRECT_PNP: attach(model, pinned, pnp),
        DRIFTING_MASACTRL: attach(model, drifting, masactrl),
        DIRECT_MASACTRL: attach(model, pinned, masactrl),
    }
    runs = {RESAMPLED: (model, Guidance(source, None, 1.0))}
    runs |= {method: (edited, guided) for method, edited in models.items()}
    if {DIRECTION, GUIDED, TWO_LATENTS} & set(methods):
        moved = Guidance([[directed(clip, cases, source[0][0]), {}]], negative, arguments.cfg)
        runs[DIRECTION] = model, moved
        for method, two in ((GUIDED, False), (TWO_LATENTS, True)):
            guide = CrossAttentionGuidance(0.3, 1.0, 64, two)
            runs[method] = attach_guide(model, pinned, guide, checkpointing=False), moved
    return {method: decode(vae, sample(*runs[method], noise, sigmas)) for method in methods}


def prompt_edit(clip, case: Edit, alignment: str) -> PromptEdit:
    captions = case.source.caption, case.target.caption
    words = [prompt_words(clip, caption, "scene") for caption in captions]
    embeddings = tuple(encode(clip, [caption])[0] for caption in captions)
    return PromptEdit(words[0], (words[1],), (alignment,), embeddings)


def prompt_to_prompt(edits: list[PromptEdit], weight: float, arguments: argparse.Namespace) -> PromptToPrompt:
    """By the arguments cross and self_, its changed words weighed by `weight`."""
    return one_edit(edits, weight, Settings(Window(0, arguments.cross), Window(0, arguments.self_), 32))


def one_edit(edits: list[PromptEdit], weight: float, settings: Settings) -> PromptToPrompt:
    """One edit for the batch, a table for each image."""
    carry = Carry(*map(torch.cat, zip(*(edit.carry(settings.alignment) for edit in edits), strict=True)))
    target = torch.cat([edit.embeddings[1] for edit in edits])
    changed = torch.cat([edit.carry("refine").own for edit in edits])
    until = torch.zeros(2, *changed.shape)
    until[1] = settings.cross.end
    gain = 1 + (weight - 1) * changed
    return PromptToPrompt(carry, target, gain, until, settings.self_, settings.self_max_side**2)


def local_blend(edits: list[PromptEdit], layout: bool = False) -> LocalBlend:
    """By the words that differ, with the node's own defaults.

    layout: of mask_from "words and layout", for which the mask fits best at 0.5 (30 other edits than the tables').
    """
    columns = [changed_columns(edit, layout) for edit in edits]
    most = max(source.shape[2] for source, _ in columns)
    stacked = tuple(torch.cat([pad(c, (0, most - c.shape[2])) for c in side]) for side in zip(*columns, strict=True))
    target = torch.cat([edit.embeddings[1] for edit in edits])
    return LocalBlend(stacked, most, target, 0.5 if layout else 0.3, 0.3, 0.2, 1, None, False, layout=layout)


def directed(clip, cases: Sequence[Edit], source: Tensor) -> Tensor:
    """The source embeddings [b, tokens, channels], each moved by the direction of its case's edit.

    A direction comes from captions of the same structure, their other words drawn at random: seldom the target's own.
    """
    moved = []
    for case, embedding in zip(cases, source, strict=True):
        pairs = [varied(case, random.Random(i)) for i in range(SENTENCES)]
        sides = ([Embedded(encode(clip, [s.caption])[0], None) for s in side] for side in zip(*pairs, strict=True))
        moved += apply([[embedding[None], {}]], direction_between(*sides), 1.0)
    return torch.cat([embedding for embedding, _ in moved])


def varied(case: Edit, rng: random.Random) -> tuple[scenes.Scene, scenes.Scene]:
    """Source and target of a case, whatever they have in common of looks, names and place drawn anew."""
    while True:
        things: tuple[list, list] = ([], [])
        for pair in zip(case.source.things, case.target.things, strict=True):
            drawn = {"look": rng.choice(scenes.LOOKS)} if pair[0].look == pair[1].look != "" else {}
            drawn |= {"name": rng.choice(list(scenes.KINDS))} if pair[0].name == pair[1].name else {}
            for side, thing in zip(things, pair, strict=True):
                side.append(replace(thing, **drawn))
        ground = {"place": rng.choice(list(scenes.PLACES))} if case.source.place == case.target.place else {}
        drawn = tuple(
            replace(scene, things=tuple(side), **ground)
            for scene, side in zip((case.source, case.target), things, strict=True)
        )
        if all(scenes.sayable(scene) and all(map(scenes.fits, scene.things)) for scene in drawn):
            return drawn


def encode(clip, captions: list[str]) -> list:
    """One CONDITIONING entry for a batch of captions."""
    (encoded,) = zip(*(clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in captions), strict=True)
    pooled = torch.cat([options["pooled_output"] for _, options in encoded])
    return [torch.cat([tokens for tokens, _ in encoded]), {"pooled_output": pooled}]


def measure(image: np.ndarray, case: Edit) -> Score:
    verdict, same = score.judge(image, case.target), score.agreement(case.source, case.target)
    return Score(*errors(image, case), all(verdict[word] for word in same if not same[word]))


def errors(image: np.ndarray, case: Edit) -> tuple[float, float]:
    """Decibels inside the change and outside it."""
    error = ((image - scenes.render(case.target)) ** 2).mean(-1)
    changed = case.mask()
    return decibels(error[changed]), decibels(error[~changed])


def decibels(error: np.ndarray) -> float:
    """Of some pixels' squared errors; NaN for none, as outside a change of time or style."""
    return float(-10 * np.log10(max(error.mean(), 1e-6))) if error.size else math.nan


def report(scores: dict[str, list[Score]], cases: Sequence[Edit]) -> None:
    """Markdown tables: means by method, then paired differences with standard errors and win counts."""
    print(f"\n{len(cases)} scenes; decibels to the true answer, higher is better\n")
    kinds = list(dict.fromkeys(case.kind for case in cases))
    print("| method | inside the change | outside it | shows what was asked | " + " | ".join(kinds) + " |")
    print("|---|---|---|---|" + "---|" * len(kinds))
    for method, rows in scores.items():
        inside, outside, shown = (np.array(values, float) for values in zip(*rows, strict=True))
        by_kind = " | ".join(
            f"{int(found.sum())}/{len(found)}" for found in (shown[[c.kind == kind for c in cases]] for kind in kinds)
        )
        errors = f"{inside.mean():.1f} | {np.nanmean(outside):.1f}"
        print(f"| {method} | {errors} | {int(shown.sum())}/{len(rows)} | {by_kind} |")
    print("\n| paired difference | inside, dB | wins | outside, dB | wins |\n|---|---|---|---|---|")
    for better, worse in (pair for pair in COMPARED if set(pair) <= set(scores)):
        cells = []
        for field in ("inside", "outside"):
            pairs = zip(scores[better], scores[worse], strict=True)
            gaps = np.array([getattr(one, field) - getattr(other, field) for one, other in pairs])
            gaps = gaps[~np.isnan(gaps)]
            error = gaps.std(ddof=1) / len(gaps) ** 0.5
            cells.append(f"{gaps.mean():+.2f} ± {error:.2f} | {int((gaps > 0).sum())}/{len(gaps)}")
        print(f"| {better} − {worse} | {' | '.join(cells)} |")
