"""A ControlNet for edges: stages `control`, `control-preview` and `control-export` of `python dev.py train`.

ControlNet (arXiv 2302.05543): a second encoder reads the hint beside the noisy latents and adds to the UNet's skips
through convolutions that begin at zero. Here it is the UNet's own encoder with two thin matrices added to each layer,
which the host builds from the model that it controls (its ControlLora): the file holds these, the network that reads
the hint, and the zero convolutions. The hint is what the host's Canny node draws, at thresholds between its defaults
and a quarter of them; half of the captions are left out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import comfy.cldm.cldm
import numpy as np
import torch
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from kornia.filters import canny
from safetensors.torch import save_file
from scipy.ndimage import binary_propagation, distance_transform_edt
from torch import Tensor, nn
from torch.func import functional_call

from . import data
from .denoiser import ALPHA_BAR, TIMESTEPS, Operations
from .distil import CFG, Lora, ddim, frozen
from .model import CHANNELS, CONTROL_WEIGHTS, PATCH, SIZE, UNET
from .run import CHECKPOINTS, Run, fitted_autoencoder, save, save_pictures
from .team import Team
from .text import attention

HINTS = CHECKPOINTS / "hints"
SHARDS = 2  # of scenes, with hints
THRESHOLDS = (0.1, 0.16, 0.25, 0.4)  # the lower; the higher is its double
RANK = 20
DROPOUT = 0.5  # of captions
OWN = ("input_hint_block.", "zero_convs.", "middle_block_out.")  # parts that the UNet's encoder lacks


class Network(comfy.cldm.cldm.ControlNet):
    """The host's ControlNet, its attention written out as everywhere in training."""

    def __init__(self) -> None:
        config = {key: value for key, value in copy.deepcopy(UNET).items() if key != "out_channels"}
        super().__init__(**config, hint_channels=3, device="cpu", operations=Operations)

    def forward(self, noisy: Tensor, timestep: Tensor, text: Tensor, hint: Tensor) -> dict[str, list[Tensor]]:
        options = {"optimized_attention_override": attention}
        emb = self.time_embed(timestep_embedding(timestep, self.model_channels))
        h, added, skips = noisy, self.input_hint_block(hint, emb, text), []
        for block, zero in zip(self.input_blocks, self.zero_convs, strict=True):
            h = block(h, emb, text, options)
            if added is not None:
                h, added = h + added, None
            skips.append(zero(h, emb, text))
        h = self.middle_block(h, emb, text, options)
        return {"middle": [self.middle_block_out(h, emb, text)], "output": skips}


class Control(nn.Module):
    """What is trained of a ControlNet of the shipped model."""

    def __init__(self) -> None:
        super().__init__()
        self.base = (frozen(),)  # no submodule: it is neither trained nor saved
        self.network = Network()
        self.network.load_state_dict(self.base[0].unet.state_dict(), strict=False)
        self.network.requires_grad_(False)
        for name, parameter in self.network.named_parameters():
            if name.startswith(OWN):
                parameter.requires_grad_(True)
                if parameter.ndim == 1 or not name.startswith(OWN[0]):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.kaiming_normal_(parameter)
        self.lora = Lora(self.network, RANK, OWN)

    def forward(self, noisy: Tensor, timestep: Tensor, text: Tensor, hint: Tensor, control: bool = True) -> Tensor:
        """The prediction v under a hint [b, 3, 128, 128] in [0, 1]."""
        added = None
        if control:
            added = functional_call(self.network, self.lora.patched(self.network), (noisy, timestep, text, hint))
        return self.base[0].velocity(noisy, timestep, text, added)

    def file(self) -> dict[str, Tensor]:
        """As the host's ControlNet loader takes it, in fp16."""
        tensors = {name: value for name, value in self.network.state_dict().items() if name.startswith(OWN)}
        for (name, shape), up, down in zip(self.lora.shapes.items(), self.lora.up, self.lora.down, strict=True):
            tensors[f"{name}.up"] = up
            tensors[f"{name}.down"] = down.view(-1, *shape[1:])
        tensors["lora_controlnet"] = torch.zeros(1)  # by which the host knows it
        return {key: value.detach().half().contiguous() for key, value in tensors.items()}


# --- hints -----------------------------------------------------------------------------------------------------------


def edges(pixels: Tensor, low: float) -> np.ndarray:
    """What the host's Canny node draws of pixels [n, 3, h, w] in [0, 1] at `low` and its double: [n, h, w], bool.

    The weak edges are followed by flooding, which takes a hundredth of kornia's time for it.
    """
    found = canny(pixels, low, 2 * low, hysteresis=False)[1][:, 0].numpy()
    beside = np.ones((3, 3), bool)
    return np.stack([binary_propagation(one == 1, beside, one > 0) for one in found])


def as_hint(drawn: Tensor) -> Tensor:
    """Of edges [n, h, w]."""
    return drawn.float().unsqueeze(1).expand(-1, 3, -1, -1)


def apart(some: np.ndarray, others: np.ndarray) -> float:
    """Pixels from an edge of either picture [h, w] to the nearest of the other, in the mean of both."""
    return float((distance_transform_edt(~others)[some].mean() + distance_transform_edt(~some)[others].mean()) / 2)


def make_hints(processes: int) -> None:
    """Of the first SHARDS shards, on disk; those that are there already stay."""
    HINTS.mkdir(parents=True, exist_ok=True)
    missing = [shard for shard in data.shards()[:SHARDS] if not _path(shard).exists()]
    with ProcessPoolExecutor(processes) as pool:
        for name in pool.map(_make_file, missing):
            print(f"hints of {name}", flush=True)


def _path(shard: Path) -> Path:
    return HINTS / shard.with_suffix(".pt").name


@torch.no_grad()
def _make_file(shard: Path) -> str:
    torch.set_num_threads(1)
    drawn = data.pictures(shard)
    parts = [edges(part.float() / 255, THRESHOLDS[i % len(THRESHOLDS)]) for i, part in enumerate(drawn.split(50))]
    save({"hints": torch.from_numpy(np.concatenate(parts))}, _path(shard))
    return shard.name


# --- training --------------------------------------------------------------------------------------------------------


def train_control(minutes: float, rate: float, decay: bool, fresh: bool, batch: int, processes: int) -> None:
    control = Control()
    run = Run("control", control, fresh)
    make_hints(processes)
    shards = data.shards()[:SHARDS]
    autoencoder, base = fitted_autoencoder(), control.base[0]
    with torch.no_grad():
        drawn = [part for shard in shards for part in data.pictures(shard).split(500)]
        latent = torch.cat([autoencoder.encode(data.as_pixels(part)) for part in drawn])
    hints = torch.cat([torch.load(_path(shard))["hints"] for shard in shards])
    rows = base.text.rows([caption for shard in shards for caption in np.load(shard)["captions"].tolist()])
    uncaptioned = base.text.rows([""])
    # A channel counts as much as it moves the pixels: outlines and colours show in the first ones, texture in the last.
    weight = autoencoder.basis.norm(dim=1).view(-1, 1, 1)
    weight = weight / weight.mean()
    print(f"{len(latent)} scenes with hints", flush=True)
    part = batch // processes

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(0, len(latent), (part,), generator=generator)
        dropped = torch.rand((part, 1), generator=generator) < DROPOUT
        strata = (torch.arange(part) + torch.rand(part, generator=generator)) / part
        # The noisier the oftener: there the layout is decided.
        timestep = (strata.sqrt() * TIMESTEPS).long().clamp(0, TIMESTEPS - 1)
        alpha_bar = ALPHA_BAR[timestep].view(-1, 1, 1, 1)
        noise = torch.randn((part, *latent.shape[1:]), generator=generator)
        noisy = alpha_bar.sqrt() * latent[chosen] + (1 - alpha_bar).sqrt() * noise
        v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latent[chosen]
        with torch.no_grad():
            text = base.text(torch.where(dropped, uncaptioned, rows[chosen]))
        predicted = control(noisy, timestep, text, as_hint(hints[chosen]))
        return ((predicted - v).square() * weight).mean()

    team = Team(run.parameters, loss, processes, run.step)
    for _ in run.steps(minutes, rate, decay):
        run.update(team.backward())


@torch.no_grad()
def preview_control(output: Path, steps: int, seed: int) -> None:
    """Eight scenes that were held out, samples of their captions with the checkpoint's averaged weights under their
    edges, the same under the empty caption, and without control, by DDIM; how far edges are apart."""
    control, autoencoder = Control(), fitted_autoencoder()
    Run("control", control).use_average()
    Run("decoder", autoencoder.decoder).use_average()
    pixels, captions = data.held_out(8)
    drawn = edges(pixels / 2 + 0.5, THRESHOLDS[0])
    hint = as_hint(torch.from_numpy(drawn))
    lines = [pixels, hint * 2 - 1]
    for said, controlled in ((captions, True), ([""] * 8, True), (captions, False)):
        latent = _sample(control, said, hint, controlled, steps, seed)
        lines.append(autoencoder.decode(latent).clamp(-1, 1))
        found = edges(lines[-1] / 2 + 0.5, THRESHOLDS[0])
        distance = np.mean([apart(one, other) for one, other in zip(found, drawn, strict=True)])
        words = "captions" if any(said) else "no words"
        print(f"{words}, {'with' if controlled else 'without'} control: edges are {distance:.2f} pixels apart")
    save_pictures(torch.cat(lines), output)


def _sample(control: Control, captions: Sequence[str], hint: Tensor, controlled: bool, steps: int, seed: int) -> Tensor:
    base, count = control.base[0], len(captions)
    text = base.text(base.text.rows([""] * count + [*captions]))
    latent = torch.randn((count, CHANNELS, SIZE // PATCH, SIZE // PATCH), generator=torch.Generator().manual_seed(seed))
    timesteps = [1 + TIMESTEPS // steps * i for i in reversed(range(steps))]
    for timestep, following in zip(timesteps, [*timesteps[1:], 0], strict=True):
        at = torch.full((2 * count,), timestep)
        v = control(latent.repeat(2, 1, 1, 1), at, text, hint.repeat(2, 1, 1, 1), controlled)
        without, said = v.chunk(2)
        kept, then = ALPHA_BAR[timestep], ALPHA_BAR[following]
        guess = kept.sqrt() * latent - (1 - kept).sqrt() * (without + CFG * (said - without))
        latent = ddim(latent, guess, kept, then)
    return latent


def export_control() -> None:
    control = Control()
    run = Run("control", control)
    run.use_average()
    save_file(control.file(), CONTROL_WEIGHTS, {"steps": json.dumps({"control": run.step})})
    print(f"{CONTROL_WEIGHTS} ({CONTROL_WEIGHTS.stat().st_size / 1e6:.2f} MB), step {run.step}")
