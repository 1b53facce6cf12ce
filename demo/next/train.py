"""Train the embedded demo model: `python dev.py train data|encoder|decoder|diffusion|preview|export`, in this order.

`data` renders scenes to `demo/checkpoints/`; `encoder` fits the latents to them, in closed form. `decoder` and
`diffusion` train for the minutes they are given, in as many sessions as one likes: each resumes from its checkpoint,
else from the weights that the pack ships (or from scratch, where `--fresh` asks for it), and `--decay` in the last
session lets the learning rate fall along a cosine to zero. `export` writes the averaged weights to the file that the
pack loads.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import comfy.ops
import numpy as np
import torch
from comfy.clip_model import CLIPTextModel
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from comfy.sd1_clip import SDTokenizer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import conv2d

from . import data, scenes
from .model import CHANNELS, PATCH, SIZE, TEXT, UNET, WEIGHTS, Autoencoder
from .muon import Muon
from .team import Team

CHECKPOINTS = Path(__file__).parent / "checkpoints"
ENCODER = CHECKPOINTS / "encoder.pt"
DECODER_BATCH = 16
CAPTION_DROPOUT = 0.12
PREFIXES = {"diffusion": "", "decoder": "vae.decoder."}  # of each stage's weights in the shipped file
TIMESTEPS = 1000
ALPHA_BAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2, 0).float()


half_precision = partial(torch.autocast, "cpu", torch.bfloat16)


class Operations(comfy.ops.disable_weight_init):
    """The host's layers, with convolutions cut to at most 128 inputs.

    Beyond that the bfloat16 weight gradient of processors without AMX is 25 times as slow.
    """

    class Conv2d(comfy.ops.disable_weight_init.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            parts = zip(x.split(128, 1), self.weight.split(128, 1), strict=True)
            first, *others = (conv2d(part, weight, None, self.stride, self.padding) for part, weight in parts)
            return sum(others, first) + self.bias.to(first.dtype).view(-1, 1, 1)


def attention(_: object, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **__) -> Tensor:
    """Attention written out: in training it is several times as fast on a processor as the host's fused one."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class TextEncoder(nn.Module):
    """The host's CLIP text model with only the token rows that scene captions use.

    Its forward pass is the host's written without in-place additions, which autograd refuses.
    """

    def __init__(self) -> None:
        super().__init__()
        tokenizer = SDTokenizer(embedding_size=TEXT["hidden_size"])
        self.tokenizer = tokenizer.tokenizer
        self.padding = tokenizer.pad_token
        self.ids = sorted({token for word in scenes.WORDS for token in self.tokenizer(word)["input_ids"]})
        self.row = {token: row for row, token in enumerate(self.ids)}
        self.tokens = nn.Parameter(torch.randn(len(self.ids), TEXT["hidden_size"]) * 0.3)
        self.model = CLIPTextModel(TEXT, torch.float32, "cpu", comfy.ops.disable_weight_init).text_model
        self.model.embeddings.token_embedding = None
        for name, parameter in self.model.named_parameters():
            if "layer_norm" in name:
                nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
            elif parameter.ndim == 1:
                nn.init.zeros_(parameter)
            elif "embedding" in name:
                nn.init.normal_(parameter, std=0.1)
            else:
                nn.init.xavier_uniform_(parameter)

    def rows(self, captions: list[str]) -> Tensor:
        """The captions' token rows, [n, 77] uint8."""
        length, rows = TEXT["max_position_embeddings"], []
        for caption in captions:
            tokens = self.tokenizer(caption)["input_ids"]
            rows.append([self.row[token] for token in tokens + [self.padding] * (length - len(tokens))])
        return torch.tensor(rows, dtype=torch.uint8)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.tokens[rows.long()] + self.model.embeddings.position_embedding.weight
        mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
        for layer in self.model.encoder.layers:
            x = x + layer.self_attn(layer.layer_norm1(x), mask, lambda *args, **kw: attention(None, *args, **kw))
            x = x + layer.mlp(layer.layer_norm2(x))
        return self.model.final_layer_norm(x)


class Denoiser(nn.Module):
    """UNet and text encoder, trained together; predicts v."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextEncoder()
        self.unet = UNetModel(**copy.deepcopy(UNET), device="cpu", dtype=torch.float32, operations=Operations)
        initialise(self.unet)
        for module in self.unet.modules():  # every residual branch starts as zero
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.out_layers[-1].weight)
            elif isinstance(module, SpatialTransformer):
                nn.init.zeros_(module.proj_out.weight)
        nn.init.zeros_(self.unet.out[-1].weight)
        self.requires_grad_(True)

    def forward(self, noisy: Tensor, timestep: Tensor, rows: Tensor) -> Tensor:
        options = {"optimized_attention_override": attention}
        return self.unet._forward(noisy, timestep.float(), self.text(rows), transformer_options=options)

    def denoised(self, noisy: Tensor, timestep: Tensor, rows: Tensor) -> Tensor:
        alpha_bar = ALPHA_BAR[timestep].view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * self(noisy, timestep, rows)


def initialise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


class Run:
    """One stage's training: optimisers, schedule, averaged weights and checkpoint."""

    def __init__(self, name: str, module: nn.Module, fresh: bool = False) -> None:
        self.path = CHECKPOINTS / f"{name}.pt"
        self.name, self.module, self.step, self.losses, self.memory = name, module, 0, [], 0.0
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        matrices = [p for n, p in module.named_parameters() if is_hidden_matrix(n, p)]
        inner = {id(p) for p in matrices}
        rest = [p for p in self.parameters if id(p) not in inner]
        # A step of an orthogonal matrix may be four times as large.
        self.optimizers = {
            Muon(matrices, lr=0.0): 4.0,
            torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.01, fused=True): 1.0,
        }
        self.use_parameters()
        if fresh:
            return
        if self.path.exists():
            saved = torch.load(self.path)
            module.load_state_dict(saved["module"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.average, self.step = saved["average"], saved["step"]
            print(f"{name}: checkpoint after step {self.step}", flush=True)
        elif WEIGHTS.exists():
            weights, steps = shipped()
            prefix = PREFIXES[name]
            module.load_state_dict({key: weights[prefix + key].float() for key in module.state_dict()})
            self.step = steps[name]
            self.use_parameters()
            print(f"{name}: the shipped weights, after step {self.step}", flush=True)
        else:
            raise SystemExit(f"there are no {name} weights yet: train that stage first, with --fresh")

    def steps(self, minutes: float, rate: float, decay: bool) -> Iterator[int]:
        """Step numbers until the time is up; the caller fills the gradients and calls `update` once for each."""
        first, start, saved = self.step, time.monotonic(), 0.0
        self.memory = 0.998 if decay else 0.9995  # weights that settle need less averaging
        while (spent := (time.monotonic() - start) / 60) < minutes:
            share = (1 + math.cos(math.pi * spent / minutes)) / 2 if decay else 1.0
            for optimizer, factor in self.optimizers.items():
                optimizer.param_groups[0]["lr"] = rate * factor * share * min(1.0, (self.step - first + 1) / 100)
            yield self.step
            if self.step % 50 == 0:
                print(f"step {self.step}: {spent:.1f} min, loss {np.mean(self.losses):.4f}", flush=True)
                self.losses.clear()
            if spent - saved > 4:
                saved = spent
                self.save()
        self.save()

    def update(self, loss: float) -> None:
        """A step along the gradients that the parameters hold."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(loss)
        kept = min(self.memory, (self.step + 1) / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - kept)

    def use_parameters(self) -> None:
        self.average = [p.detach().clone() for p in self.parameters]

    def use_average(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)

    def save(self) -> None:
        state = {
            "module": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average,
            "step": self.step,
        }
        save(state, self.path)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Weights between two hidden layers: neither embeddings nor what first reads or last writes."""
    ends = ("unet.input_blocks.0.", "unet.out.", "text.tokens")
    return parameter.ndim > 1 and not name.startswith(ends) and "embedding" not in name


def save(state: dict, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def shipped() -> tuple[dict[str, Tensor], dict[str, int]]:
    """The weights that the pack ships, and how many steps each stage had taken."""
    with safe_open(WEIGHTS, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["steps"])  # noqa: SIM118


def fitted_autoencoder() -> Autoencoder:
    """The encoder as fitted here or as shipped; the decoder untrained."""
    autoencoder = Autoencoder()
    if ENCODER.exists():
        encoder = torch.load(ENCODER)
    elif WEIGHTS.exists():
        weights, _ = shipped()
        encoder = {name: weights[f"vae.{name}"].float() for name in ("mean", "basis")}
    else:
        raise SystemExit("there is no encoder yet: run the stage encoder first")
    autoencoder.load_state_dict(encoder, strict=False)
    return autoencoder


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
        pixels = autoencoder.decode(guess).clamp(-1, 1)
    lines = [torch.cat([*line], 2) for line in pixels.split(8)]
    Image.fromarray(((torch.cat(lines, 1).movedim(0, -1) + 1) * 127.5).byte().numpy()).save(output)
    print(output)


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
    parser.add_argument("stage", choices=("data", "encoder", "decoder", "diffusion", "preview", "export"))
    parser.add_argument("--scenes", type=int, default=60000, help="of data: how many")
    parser.add_argument("--processes", type=int, default=2, help="that render or train at once")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--batch", type=int, default=32, help="of diffusion")
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
    elif arguments.stage == "preview":
        preview(arguments.captions, arguments.output, arguments.cfg, arguments.steps, arguments.seed)
    else:
        export()


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
