"""Train the embedded demo model on freshly rendered scenes: `python dev.py train diffusion|decoder|export`.

Every stage resumes from its checkpoint in `demo/checkpoints/`, else from the weights that the pack ships (or from
scratch, where `--fresh` asks for it), and trains for the minutes it is given, the learning rate falling along a cosine
to zero at the end. `export` writes the averaged weights to the file that the pack loads.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import comfy.ops
import numpy as np
import torch
from comfy.clip_model import CLIPTextModel
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from comfy.sd1_clip import SDTokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import scenes
from .model import TEXT, UNET, WEIGHTS, Autoencoder

CHECKPOINTS = Path(__file__).parent / "checkpoints"
BATCH = 32
PAIRS = 0.6  # share of scenes with two things, the harder half
CAPTION_DROPOUT = 0.12
PREFIXES = {"diffusion": "", "decoder": "vae."}  # of each stage's weights in the shipped file
WORDS = [
    "a on next to above background",
    *scenes.SIZES,
    *scenes.COLORS,
    *scenes.SHAPES,
    *scenes.TEXTURES,
    *scenes.BACKGROUNDS,
]
TIMESTEPS = 1000
ALPHA_BAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2, 0).float()


class TextEncoder(nn.Module):
    """The host's CLIP text model with only the token rows that scene captions use.

    Its forward pass is the host's written without in-place additions, which autograd refuses.
    """

    def __init__(self) -> None:
        super().__init__()
        tokenizer = SDTokenizer(embedding_size=TEXT["hidden_size"])
        self.tokenizer = tokenizer.tokenizer
        self.padding = tokenizer.pad_token
        self.ids = sorted({token for word in WORDS for token in self.tokenizer(word)["input_ids"]})
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

    def forward(self, captions: list[str]) -> Tensor:
        rows = []
        for caption in captions:
            tokens = self.tokenizer(caption)["input_ids"]
            tokens += [self.padding] * (TEXT["max_position_embeddings"] - len(tokens))
            rows.append([self.row[token] for token in tokens])
        x = self.tokens[torch.tensor(rows)] + self.model.embeddings.position_embedding.weight
        mask = torch.full((x.shape[1], x.shape[1]), -torch.finfo(x.dtype).max).triu(1)
        for layer in self.model.encoder.layers:
            x = x + layer.self_attn(layer.layer_norm1(x), mask, attention_pytorch)
            x = x + layer.mlp(layer.layer_norm2(x))
        return self.model.final_layer_norm(x)


class Denoiser(nn.Module):
    """UNet and text encoder, trained together; predicts the noise (eps)."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextEncoder()
        self.unet = UNetModel(
            **copy.deepcopy(UNET), device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init
        )
        for module in self.unet.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.unet.modules():  # every residual branch starts as zero
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.out_layers[-1].weight)
            elif isinstance(module, SpatialTransformer):
                nn.init.zeros_(module.proj_out.weight)
        nn.init.zeros_(self.unet.out[-1].weight)
        self.requires_grad_(True)

    def forward(self, noisy: Tensor, timestep: Tensor, captions: list[str]) -> Tensor:
        return self.unet._forward(noisy, timestep.float(), self.text(captions), transformer_options={})


class Run:
    """One stage's training: optimiser, schedule, averaged weights and checkpoint."""

    def __init__(self, name: str, module: nn.Module, minutes: float = 0, rate: float = 0, fresh: bool = False) -> None:
        self.path = CHECKPOINTS / f"{name}.pt"
        self.module, self.seconds, self.rate = module, minutes * 60, rate
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.use_parameters()
        self.step = 0
        if self.path.exists() and not fresh:
            saved = torch.load(self.path)
            module.load_state_dict(saved["module"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average, self.step = saved["average"], saved["step"]
            print(f"{name}: resuming after step {self.step}", flush=True)
        elif WEIGHTS.exists() and not fresh:
            shipped = load_file(WEIGHTS)
            prefix = PREFIXES[name]
            module.load_state_dict({key: shipped[prefix + key].float() for key in module.state_dict()})
            self.use_parameters()
            print(f"{name}: starting from the shipped weights", flush=True)
        elif not minutes:
            raise SystemExit(f"there are no {name} weights yet: train that stage first")

    def steps(self) -> Iterator[int]:
        """Step numbers until the time is up; the caller computes a loss and calls `update` once for each."""
        first, start, told = self.step, time.monotonic(), 0.0
        while (spent := time.monotonic() - start) < self.seconds:
            warm_up = min(1.0, (self.step - first + 1) / 100)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * warm_up * (0.02 + 0.49 * (1 + math.cos(math.pi * spent / self.seconds)))
            yield self.step
            if spent - told > 300:
                told = spent
                self.save()
        self.save()

    def update(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(0.998, (self.step + 1) / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        if self.step % 50 == 0:
            print(f"step {self.step}: loss {loss.item():.4f}", flush=True)

    def use_parameters(self) -> None:
        self.average = [p.detach().clone() for p in self.parameters]

    def use_average(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)

    def save(self) -> None:
        CHECKPOINTS.mkdir(exist_ok=True)
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)


def batch(rng: random.Random, size: int) -> tuple[Tensor, list[str]]:
    """Random scenes: pixels [size, 3, 64, 64] in [-1, 1] and their captions."""
    drawn = [scenes.sample(rng, pair=rng.random() < PAIRS) for _ in range(size)]
    pixels = torch.from_numpy(np.stack([scenes.render(scene) for scene in drawn])).movedim(-1, 1)
    return pixels * 2 - 1, [scene.caption for scene in drawn]


def train_diffusion(minutes: float, rate: float, fresh: bool) -> None:
    denoiser, autoencoder = Denoiser(), Autoencoder()
    run = Run("diffusion", denoiser, minutes, rate, fresh)
    rng, generator = random.Random(run.step), torch.Generator().manual_seed(run.step)
    for _ in run.steps():
        pixels, captions = batch(rng, BATCH)
        captions = ["" if rng.random() < CAPTION_DROPOUT else caption for caption in captions]
        latent = autoencoder.encode(pixels)
        strata = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        timestep = (strata * TIMESTEPS).long().clamp(0, TIMESTEPS - 1)
        alpha_bar = ALPHA_BAR[timestep].view(-1, 1, 1, 1)
        noise = torch.randn(latent.shape, generator=generator)
        noisy = alpha_bar.sqrt() * latent + (1 - alpha_bar).sqrt() * noise
        error = denoiser(noisy, timestep, captions) - noise
        # A plain eps loss hardly pays for the global colour at high noise: weigh it like x0, and its mean once more.
        weight = ((1 - alpha_bar) / alpha_bar).clamp(1, 20).flatten()
        run.update((weight * (error.square().mean((1, 2, 3)) + 4 * error.mean((2, 3)).square().mean(1))).mean())


def train_decoder(minutes: float, rate: float, fresh: bool) -> None:
    """The decoder learns to draw clean pictures from what samplers leave: the denoiser's own x0 guesses, and noise."""
    denoiser, autoencoder = Denoiser(), Autoencoder()
    Run("diffusion", denoiser).use_average()
    for module in autoencoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(autoencoder.decoder.conv_out.weight)
    run = Run("decoder", autoencoder, minutes, rate, fresh)
    rng, generator = random.Random(run.step), torch.Generator().manual_seed(run.step)
    half = BATCH // 4
    for _ in run.steps():
        pixels, captions = batch(rng, 2 * half)
        latent = autoencoder.encode(pixels)
        noise = torch.randn(latent.shape, generator=generator)
        level = torch.rand((half, 1, 1, 1), generator=generator) * 0.3
        timestep = torch.randint(0, 400, (half,), generator=generator)
        with torch.no_grad():
            alpha_bar = ALPHA_BAR[timestep].view(-1, 1, 1, 1)
            noisy = alpha_bar.sqrt() * latent[:half] + (1 - alpha_bar).sqrt() * noise[:half]
            predicted = denoiser(noisy, timestep, captions[:half])
            guess = (noisy - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()
        error = autoencoder.decode(torch.cat((guess, latent[half:] + level * noise[half:]))) - pixels
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        run.update(error.abs().mean() + edges)


def export() -> None:
    denoiser, autoencoder = Denoiser(), Autoencoder()
    for name, module in (("diffusion", denoiser), ("decoder", autoencoder)):
        Run(name, module).use_average()
    state = denoiser.state_dict() | {f"vae.{key}": value for key, value in autoencoder.state_dict().items()}
    tensors = {key: value.half().contiguous() for key, value in state.items()}
    save_file(tensors | {"text.ids": torch.tensor(denoiser.text.ids, dtype=torch.int32)}, WEIGHTS)
    print(f"{WEIGHTS} ({WEIGHTS.stat().st_size / 1e6:.1f} MB)")


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py train", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("diffusion", "decoder", "export"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--fresh", action="store_true", help="start from scratch")
    arguments = parser.parse_args()
    if arguments.stage == "diffusion":
        train_diffusion(arguments.minutes, arguments.rate, arguments.fresh)
    elif arguments.stage == "decoder":
        train_decoder(arguments.minutes, arguments.rate, arguments.fresh)
    else:
        export()


if __name__ == "__main__":
    main()
