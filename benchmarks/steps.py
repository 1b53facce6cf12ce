"""What an edit is worth at 4 to 50 steps, against the rows of the network that it costs, with and without inversion.

Scenes, edits and scores are those of `bench edits`; the settings are the same at every number of steps.
"""

from __future__ import annotations

import argparse

import comfy.samplers
import numpy as np
import torch

from ..attention.pnp import PlugAndPlay
from ..demo import model as demo_model
from ..demo import scenes
from ..host.branch.source import attach
from ..host.run.cost import metered
from ..host.unet.tree import decoder_from_second
from ..inversion.ddim import leading_sigmas
from ..inversion.run import Guidance, invert, resample
from ..inversion.virtual import PRESETS, invert_virtually, schedule
from .edits import DIRECT, DIRECT_PNP, draw_cases, encode, measure, prompt_edit, prompt_to_prompt
from .picture import decode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 12, 20, 50])
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--strength", type=float, default=0.7, help="of Virtual Inversion")
    parser.add_argument("--seed", type=int, default=2026)
    parser.set_defaults(cross=0.8, self_=0.4)


def run(arguments: argparse.Namespace) -> None:
    """A Markdown table: means over the scenes, rows of one image's edit with its inversion."""
    model, clip, vae = demo_model.load()
    cases = draw_cases("swap", arguments.scenes, arguments.seed)
    source, target = ([encode(clip, [getattr(case, side).caption for case in cases])] for side in ("source", "target"))
    guided = Guidance(target, [encode(clip, [""])], arguments.cfg)
    samples = vae.encode(torch.from_numpy(np.stack([scenes.render(case.source) for case in cases])))
    p2p = prompt_to_prompt([prompt_edit(clip, case, "swap") for case in cases], 1.0, arguments)
    decoder = decoder_from_second(model.model.diffusion_model)
    inverted = {DIRECT: p2p, DIRECT_PNP: PlugAndPlay(tuple(decoder[:1]), tuple(decoder), 0.8, 0.5)}
    table = model.get_model_object("model_sampling").sigmas
    print(f"{len(cases)} scenes, cfg {arguments.cfg:g}\n")
    print("| method | steps | rows | inside, dB | outside, dB | shown |\n|---|---|---|---|---|---|")
    for steps in arguments.steps:
        for method in (*inverted, *PRESETS):
            counted, cost = metered(model)
            if method in inverted:
                trajectory = invert(counted, Guidance(source), samples, leading_sigmas(table, steps))
                edited, sampler = attach(counted, trajectory, inverted[method]), "euler"
            else:
                sampler, fresh = PRESETS[method]
                sigmas = schedule(model, "karras", steps, arguments.strength)
                edited, trajectory = invert_virtually(counted, source, samples, sigmas, fresh)
            latent = resample(edited, trajectory, guided, comfy.samplers.sampler_object(sampler))
            scores = [measure(image, case) for image, case in zip(decode(vae, latent), cases, strict=True)]
            inside, outside, shown = np.array(scores, float).mean(0)
            cells = f"{sum(cost.rows) // len(cases)} | {inside:.1f} | {outside:.1f} | {shown * len(cases):.0f}"
            print(f"| {method} | {steps} | {cells}/{len(cases)} |", flush=True)
