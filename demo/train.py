"""Train the embedded demo model: `python dev.py train data|encoder|decoder|diffusion|preview|export`, in this order.

`data` renders scenes to `demo/checkpoints/`; `encoder` fits the latents to them, in closed form. `decoder` and
`diffusion` train for the minutes they are given, in as many sessions as one likes: each resumes from its checkpoint,
else from the weights that the pack ships (or from scratch, where `--fresh` asks for it), and `--decay` in the last
session lets the learning rate fall along a cosine to zero. `export` writes the averaged weights to the file that the
pack loads. The flow model has stages of its own, on the same scenes: `flow`, `flow-preview` and `flow-export`; so has
the LoRA for few steps, on walks of the shipped model, at first always `--fresh`: `lcm`, `lcm-preview` and `lcm-export`;
the CLIP that sees through noise: `clip`, `clip-export` and `clip-test`; the model that follows instructions, on the
pairs of `dev.py pairs`: `instruct` and `instruct-export`; the inpainting model: `inpaint` and `inpaint-export`;
and the ControlNet: `control`, `control-preview` and `control-export`. These too begin with `--fresh`.
"""

from __future__ import annotations

import argparse
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import data
from .control import export_control, preview_control, train_control
from .denoiser import ALPHA_BAR, TIMESTEPS, Denoiser, initialise
from .distil import export_lcm, preview_lcm, train_lcm
from .model import CHANNELS, PATCH, SIZE, WEIGHTS, Autoencoder
from .run import CAPTION_DROPOUT, CHECKPOINTS, ENCODER, Run, fitted_autoencoder, save, save_pictures
from .team import Team
from .train_clip import export_clip, test_clip, train_clip
from .train_flow import export_flow, preview_flow, train_flow
from .train_inpaint import export_inpaint, train_inpaint
from .train_instruct import export_instruct, train_instruct

DECODER_BATCH = 16

half_precision = partial(torch.autocast, "cpu", torch.bfloat16)


def fit_encoder() -> None:
    autoencoder = Autoencoder()
    data.fit_encoder(autoencoder)
    save({"mean": autoencoder.mean, "basis": autoencoder.basis}, ENCODER)
    pixels, _ = data.held_out(200)
    latent = autoencoder.encode(pixels)
    print(f"latents' standard deviations: {[round(x, 2) for x in latent.std((0, 2, 3)).tolist()]}")
    print(f"linear decoding: {psnr(autoencoder.linear(latent), pixels):.2f} dB on {len(pixels)} held-out scenes")


def psnr(pixels: Tensor, truth: Tensor) -> float:
    """Mean over the pictures, in dB, of pixels in [-1, 1]."""
    error = ((pixels.clamp(-1, 1) - truth) / 2).square().mean((1, 2, 3))
    return float(-10 * error.log10().mean())


def train_diffusion(minutes: float, rate: float, decay: bool, fresh: bool, batch: int, processes: int) -> None:
    denoiser = Denoiser()
    run = Run("diffusion", denoiser, fresh)
    autoencoder = fitted_autoencoder()
    with torch.no_grad():
        latent, captions = data.latents(autoencoder)
    # A channel counts as much as it moves the pixels: outlines and colours show in the first ones, texture in the last.
    weight = autoencoder.basis.norm(dim=1).view(-1, 1, 1)
    weight = weight / weight.mean()
    rows, uncaptioned = denoiser.text.rows(captions), denoiser.text.rows([""])
    print(f"{len(latent)} scenes, latents of standard deviation {latent.float().std():.3f}", flush=True)
    part = batch // processes

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(0, len(latent), (part,), generator=generator)
        dropped = torch.rand((part, 1), generator=generator) < CAPTION_DROPOUT
        strata = (torch.arange(part) + torch.rand(part, generator=generator)) / part
        # Half of them from the third of the noise levels at which things take shape.
        strata = strata + 0.5 / math.tau * (math.tau * strata).sin()
        timestep = (strata * TIMESTEPS).long().clamp(0, TIMESTEPS - 1)
        alpha_bar = ALPHA_BAR[timestep].view(-1, 1, 1, 1)
        clean = latent[chosen].float()
        noise = torch.randn(clean.shape, generator=generator)
        noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
        v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean
        with half_precision():
            predicted = denoiser(noisy, timestep, torch.where(dropped, uncaptioned, rows[chosen]))
        return ((predicted.float() - v).square() * weight).mean()

    team = Team(run.parameters, loss, processes, run.step)
    for _ in run.steps(minutes, rate, decay):
        run.update(team.backward())


def train_decoder(minutes: float, rate: float, decay: bool, fresh: bool, guesses: bool, processes: int) -> None:
    """The decoder learns to draw clean pictures from noisy latents, half of them the denoiser's own x0 where asked."""
    autoencoder, denoiser = fitted_autoencoder(), Denoiser()
    initialise(autoencoder.decoder)
    nn.init.zeros_(autoencoder.decoder[-2].weight)
    run = Run("decoder", autoencoder.decoder, fresh)
    if guesses:
        Run("diffusion", denoiser).use_average()
    shards = data.shards()[:4]
    drawn = torch.cat([data.pictures(shard) for shard in shards])
    captions = [caption for shard in shards for caption in np.load(shard)["captions"].tolist()]
    truth, _ = data.held_out(64)
    part = DECODER_BATCH // processes

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(0, len(drawn), (part,), generator=generator)
        pixels = data.as_pixels(drawn[chosen])
        clean = autoencoder.encode(pixels)
        noise = torch.randn(clean.shape, generator=generator)
        latent = clean + torch.rand((part, 1, 1, 1), generator=generator) * 0.2 * noise
        if guesses:
            half = part // 2
            timestep = torch.randint(0, 400, (half,), generator=generator)
            alpha_bar = ALPHA_BAR[timestep].view(-1, 1, 1, 1)
            noisy = alpha_bar.sqrt() * clean[:half] + (1 - alpha_bar).sqrt() * noise[:half]
            with torch.no_grad(), half_precision():
                rows = denoiser.text.rows([captions[i] for i in chosen[:half].tolist()])
                latent[:half] = denoiser.denoised(noisy, timestep, rows)
        with half_precision():
            added = autoencoder.decoder(latent)
        error = autoencoder.linear(latent) + added.float() - pixels
        return error.abs().mean() + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()

    team = Team(run.parameters, loss, processes, run.step)
    for step in run.steps(minutes, rate, decay):
        run.update(team.backward())
        if step % 100 == 99:
            with torch.no_grad():
                print(f"{psnr(autoencoder.decode(autoencoder.encode(truth)), truth):.2f} dB", flush=True)
    run.use_average()
    run.module.half().float()
    truth, _ = data.held_out(200)
    with torch.no_grad():
        decibels = psnr(autoencoder.decode(autoencoder.encode(truth)), truth)
    print(f"averaged weights in fp16: {decibels:.2f} dB on 200 held-out scenes")


def preview(captions: list[str], output: Path, cfg: float, steps: int, seed: int) -> None:
    """Samples of the checkpoint's averaged weights, eight in a row, two seeds each; DDIM on the leading timesteps."""
    denoiser, autoencoder = Denoiser(), fitted_autoencoder()
    Run("diffusion", denoiser).use_average()
    Run("decoder", autoencoder.decoder).use_average()
    captions = captions * 2
    rows = denoiser.text.rows([""] * len(captions) + captions)
    shape = (len(captions), CHANNELS, SIZE // PATCH, SIZE // PATCH)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    timesteps = [1 + TIMESTEPS // steps * i for i in reversed(range(steps))]
    with torch.no_grad(), half_precision():
        for timestep, following in zip(timesteps, [*timesteps[1:], 0], strict=True):
            at = torch.full((2 * len(captions),), timestep)
            without, with_caption = denoiser.denoised(latent.repeat(2, 1, 1, 1), at, rows).chunk(2)
            guess = without + cfg * (with_caption - without)
            now, then = ALPHA_BAR[timestep], ALPHA_BAR[following]
            noise = (latent - now.sqrt() * guess) / (1 - now).sqrt()
            latent = then.sqrt() * guess + (1 - then).sqrt() * noise
    with torch.no_grad():
        pixels = autoencoder.decode(guess)
    save_pictures(pixels, output)


def export() -> None:
    denoiser, autoencoder = Denoiser(), fitted_autoencoder()
    runs = [Run("diffusion", denoiser), Run("decoder", autoencoder.decoder)]
    for run in runs:
        run.use_average()
    state = denoiser.state_dict() | {f"vae.{key}": value for key, value in autoencoder.state_dict().items()}
    tensors = {key: value.half().contiguous() for key, value in state.items()}
    tensors["text.ids"] = torch.tensor(denoiser.text.ids, dtype=torch.int32)
    steps = {run.name: run.step for run in runs}
    save_file(tensors, WEIGHTS, {"steps": json.dumps(steps)})
    print(f"{WEIGHTS} ({WEIGHTS.stat().st_size / 1e6:.1f} MB), steps {steps}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py train", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--scenes", type=int, default=60000, help="of data: how many")
    parser.add_argument("--processes", type=int, default=2, help="that render or train at once")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--batch", type=int, default=32, help="but of encoder and decoder")
    parser.add_argument("--decay", action="store_true", help="let the rate fall to zero by the end")
    parser.add_argument("--fresh", action="store_true", help="start from scratch")
    parser.add_argument("--guesses", action="store_true", help="of decoder: train it on the denoiser's pictures too")
    parser.add_argument("--captions", nargs="+", default=CAPTIONS, help="of preview: what to draw")
    parser.add_argument("--output", type=Path, default=CHECKPOINTS / "preview.png", help="of preview")
    parser.add_argument("--cfg", type=float, default=4.0, help="of preview")
    parser.add_argument("--steps", type=int, default=50, help="of preview")
    parser.add_argument("--seed", type=int, default=0, help="of preview")
    arguments = parser.parse_args()
    training = (arguments.minutes, arguments.rate, arguments.decay, arguments.fresh)
    if arguments.stage == "data":
        data.render(arguments.scenes, arguments.processes)
    elif arguments.stage == "encoder":
        fit_encoder()
    elif arguments.stage == "decoder":
        train_decoder(*training, arguments.guesses, arguments.processes)
    elif arguments.stage == "diffusion":
        train_diffusion(*training, arguments.batch, arguments.processes)
    elif arguments.stage == "flow":
        train_flow(*training, arguments.batch, arguments.processes)
    elif arguments.stage == "lcm":
        train_lcm(*training, arguments.batch, arguments.processes)
    elif arguments.stage == "clip":
        train_clip(*training, arguments.batch, arguments.processes)
    elif arguments.stage == "instruct":
        train_instruct(*training, arguments.batch, arguments.processes)
    elif arguments.stage == "inpaint":
        train_inpaint(*training, arguments.batch, arguments.processes)
    elif arguments.stage == "control":
        train_control(*training, arguments.batch, arguments.processes)
    elif arguments.stage == "preview":
        preview(arguments.captions, arguments.output, arguments.cfg, arguments.steps, arguments.seed)
    elif arguments.stage == "flow-preview":
        preview_flow(arguments.captions, arguments.output, arguments.cfg, arguments.steps, arguments.seed)
    elif arguments.stage == "lcm-preview":
        preview_lcm(arguments.captions, arguments.output, arguments.steps, arguments.seed)
    elif arguments.stage == "control-preview":
        preview_control(arguments.output, arguments.steps, arguments.seed)
    elif arguments.stage == "clip-test":
        test_clip()
    else:
        exports = {"export": export, "flow-export": export_flow, "lcm-export": export_lcm, "clip-export": export_clip}
        exports |= {"instruct-export": export_instruct, "inpaint-export": export_inpaint}
        exports |= {"control-export": export_control}
        exports[arguments.stage]()


STAGES = ("data", "encoder", "decoder", "diffusion", "preview", "export", "flow", "flow-preview", "flow-export")
STAGES += ("lcm", "lcm-preview", "lcm-export", "clip", "clip-export", "clip-test", "instruct", "instruct-export")
STAGES += ("inpaint", "inpaint-export", "control", "control-preview", "control-export")
CAPTIONS = [
    "a photo of a red cat on a meadow",
    "a photo of a dog with a hat facing right on a beach",
    "a photo of a large blue car in the snow at sunset",
    "a photo of a golden cup on a street at night",
    "a photo of a green tree next to a purple house in a desert",
    "a photo of a white rabbit in front of a stone castle in a forest",
    "a pencil drawing of a sleeping sheep on a meadow",
    "a watercolor of a small wooden boat next to a yellow pumpkin on a beach",
]


if __name__ == "__main__":
    main()
