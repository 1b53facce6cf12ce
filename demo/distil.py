"""A LoRA for few steps: stages `lcm`, `lcm-preview` and `lcm-export` of `python dev.py train`.

As with latent consistency models (arXiv 2310.04378) and LCM-LoRA (2311.05556), a student that begins as its teacher
learns to say at once where the teacher's steps lead, the teacher guided at one fixed scale. Where those go by one step
of the teacher and the student's own answer behind it, this one learns from whole walks of the teacher, made beforehand:
a state costs two rows once and serves as often as one likes. It looks a quarter of the schedule ahead, which four steps
need, and from the last quarter to the image: multistep consistency (2403.06807) with segments that begin anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from . import data
from .denoiser import ALPHA_BAR, TIMESTEPS, Denoiser
from .model import CHANNELS, LCM_WEIGHTS, PATCH, SIZE
from .run import CHECKPOINTS, Run, fitted_autoencoder, save, save_pictures, shipped
from .team import Team
from .text import attention

WALKS = CHECKPOINTS / "walks"
FILES = 8
BATCH, BATCHES = 16, 4  # of walks in a file; half of the batches begin with pure noise
CFG = 4.0
STRIDE = 50  # levels that the teacher takes in a step
AHEAD = 250  # levels that the student is to see ahead
DROPOUT = 0.06  # of captions
RANK = 12  # 1.9 MB in fp16
ELBOW = 0.03  # error at which the loss turns from squared to absolute
KEPT = torch.cat([torch.ones(1), ALPHA_BAR])  # of the image's variance, at levels from 0, the image, to 1000


class Lora(nn.Module):
    """What is added to the layers of a UNet: two thin matrices each, of (outputs, all else) of a convolution."""

    def __init__(self, unet: nn.Module, rank: int, without: str | tuple[str, ...] = ()) -> None:
        """without: how the names of layers begin to which nothing is added."""
        super().__init__()
        self.shapes = {
            name: layer.weight.shape
            for name, layer in unet.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and not name.startswith(without)
        }
        sides = [(shape[0], shape[1:].numel()) for shape in self.shapes.values()]
        self.up = nn.ParameterList(torch.zeros(rows, rank) for rows, _ in sides)
        self.down = nn.ParameterList(torch.randn(rank, columns) / columns**0.5 for _, columns in sides)

    def patched(self, unet: nn.Module) -> dict[str, Tensor]:
        """The weights of the UNet's layers with what is added to them."""
        return {
            f"{name}.weight": unet.get_submodule(name).weight + (up @ down).view(shape)
            for (name, shape), up, down in zip(self.shapes.items(), self.up, self.down, strict=True)
        }

    def file(self) -> dict[str, Tensor]:
        """As the host's LoRA loaders take it, in fp16."""
        tensors = {}
        for (name, shape), up, down in zip(self.shapes.items(), self.up, self.down, strict=True):
            key, side = f"diffusion_model.{name}", shape[2:]
            tensors[f"{key}.lora_up.weight"] = up.view(*up.shape, *[1] * len(side))
            tensors[f"{key}.lora_down.weight"] = down.view(-1, shape[1], *side)
            tensors[f"{key}.alpha"] = torch.tensor(float(len(down)))  # over the rank: the scale, 1
        return {key: value.detach().half().contiguous() for key, value in tensors.items()}


class Student(nn.Module):
    """The shipped model with a LoRA, which alone is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = (frozen(),)  # no submodule: it is neither trained nor saved
        self.lora = Lora(self.frozen[0].unet, RANK)

    def forward(self, noisy: Tensor, levels: Tensor, text: Tensor) -> Tensor:
        """The image [b, c, h, w] that [b] levels and embeddings make of noisy latents."""
        unet = self.frozen[0].unet
        options = {"transformer_options": {"optimized_attention_override": attention}}
        v = functional_call(unet, self.lora.patched(unet), (noisy, (levels - 1).float(), text), options)
        kept = KEPT[levels].view(-1, 1, 1, 1)
        return kept.sqrt() * noisy - (1 - kept).sqrt() * v


def frozen() -> Denoiser:
    """The shipped UNet and text encoder."""
    denoiser = Denoiser()
    weights, _ = shipped()
    denoiser.load_state_dict({key: weights[key].float() for key in denoiser.state_dict()})
    return denoiser.requires_grad_(False)


# --- the teacher's walks ---------------------------------------------------------------------------------------------


def make_walks(processes: int) -> None:
    """FILES of them on disk; those that are there already stay."""
    WALKS.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(FILES) if not _path(number).exists()]
    with ProcessPoolExecutor(processes) as pool:
        for number in pool.map(_make_file, missing):
            print(f"walks {number * BATCH * BATCHES} to {(number + 1) * BATCH * BATCHES}", flush=True)


def walk(teacher: Denoiser, noisy: Tensor, levels: Sequence[int], rows: Tensor, unsaid: Tensor) -> Tensor:
    """The states [levels, b, c, h, w] at falling levels by DDIM, guided at CFG away from the empty caption."""
    text = teacher.text(torch.cat([unsaid.expand(len(rows), -1), rows]))
    states = [noisy]
    for level, following in zip(levels[:-1], levels[1:], strict=True):
        at = torch.full((2 * len(rows),), level - 1)
        without, said = teacher.denoised_by(states[-1].repeat(2, 1, 1, 1), at, text).chunk(2)
        states.append(ddim(states[-1], without + CFG * (said - without), KEPT[level], KEPT[following]))
    return torch.stack(states)


def ddim(noisy: Tensor, denoised: Tensor, kept: Tensor, then: Tensor) -> Tensor:
    """A step to where `then` of the image's variance is kept."""
    return then.sqrt() * denoised + ((1 - then) / (1 - kept)).sqrt() * (noisy - kept.sqrt() * denoised)


def _path(number: int) -> Path:
    return WALKS / f"{number:03}.pt"


@torch.no_grad()
def _make_file(number: int) -> int:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(number)
    shards = data.shards()
    shard = shards[number % len(shards)]
    drawn, captions = data.pictures(shard), np.load(shard)["captions"].tolist()
    teacher, autoencoder = frozen(), fitted_autoencoder()
    unsaid, walks = teacher.text.rows([""]), []
    for batch in range(BATCHES):
        chosen = torch.randint(0, len(drawn), (BATCH,), generator=generator)
        rows = teacher.text.rows([captions[i] for i in chosen.tolist()])
        rows = torch.where(torch.rand((BATCH, 1), generator=generator) < DROPOUT, unsaid, rows)
        offset = int(torch.randint(0, STRIDE, (1,), generator=generator))
        levels = [*range(TIMESTEPS - offset, 0, -STRIDE), 0]
        noisy = torch.randn((BATCH, CHANNELS, SIZE // PATCH, SIZE // PATCH), generator=generator)
        if batch < BATCHES // 2:
            levels[0] = TIMESTEPS
        else:  # with a scene under the noise, anywhere
            levels = levels[int(torch.randint(0, len(levels) - 1, (1,), generator=generator)) :]
            kept = KEPT[levels[0]]
            noisy = kept.sqrt() * autoencoder.encode(data.as_pixels(drawn[chosen])) + (1 - kept).sqrt() * noisy
        states = walk(teacher, noisy, levels, rows, unsaid)
        walks.append({"states": states.half(), "levels": levels, "rows": rows})
    save(walks, _path(number))
    return number


# --- training --------------------------------------------------------------------------------------------------------


class Examples(NamedTuple):
    """States of all walks [n, c, h, w], their levels [n], and the image that the student is to see in each.

    text: of each walk; said: which walk a state is of.
    """

    noisy: Tensor
    levels: Tensor
    image: Tensor
    text: Tensor
    said: Tensor


@torch.no_grad()
def examples(teacher: Denoiser) -> Examples:
    columns = Examples([], [], [], [], [])
    walks = 0
    for number in range(FILES):
        for made in torch.load(_path(number)):
            states, levels, count = made["states"].float(), made["levels"], len(made["rows"])
            columns.text.append(teacher.text(made["rows"]))
            for i, level in enumerate(levels[:-1]):
                j = next(j for j, later in enumerate(levels) if later <= max(level - AHEAD, 0))
                columns.noisy.append(states[i])
                columns.image.append(aim(states[i], states[j], KEPT[level], KEPT[levels[j]]))
                columns.levels.append(torch.full((count,), level))
                columns.said.append(torch.arange(walks, walks + count))
            walks += count
    return Examples(*(torch.cat(column) for column in columns))


def aim(noisy: Tensor, later: Tensor, kept: Tensor, then: Tensor) -> Tensor:
    """The image by which one DDIM step leads from a state to a later one."""
    shrunk = ((1 - then) / (1 - kept)).sqrt()
    return (later - shrunk * noisy) / (then.sqrt() - shrunk * kept.sqrt())


def huber(error: Tensor, weight: Tensor) -> Tensor:
    """The pseudo-Huber loss of errors [b, c, h, w], `weight` [c, 1, 1] of their squares."""
    return ((error.square() * weight + ELBOW**2).sqrt() - ELBOW).mean()


def train_lcm(minutes: float, rate: float, decay: bool, fresh: bool, batch: int, processes: int) -> None:
    student = Student()
    run = Run("lcm", student, fresh)
    make_walks(processes)
    known = examples(student.frozen[0])
    # A channel counts as much as it moves the pixels: outlines and colours show in the first ones, texture in the last.
    weight = fitted_autoencoder().basis.norm(dim=1).view(-1, 1, 1)
    weight = weight / weight.mean()
    print(f"{len(known.noisy)} states of {len(known.text)} walks", flush=True)
    share = batch // processes

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(0, len(known.noisy), (share,), generator=generator)
        image = student(known.noisy[chosen], known.levels[chosen], known.text[known.said[chosen]])
        return huber(image - known.image[chosen], weight)

    team = Team(run.parameters, loss, processes, run.step)
    for _ in run.steps(minutes, rate, decay):
        run.update(team.backward())


@torch.no_grad()
def preview_lcm(captions: list[str], output: Path, steps: int, seed: int) -> None:
    """Samples of the checkpoint's averaged weights, eight in a row, two seeds each, by DDIM without guidance."""
    student, autoencoder = Student(), fitted_autoencoder()
    Run("lcm", student).use_average()
    Run("decoder", autoencoder.decoder).use_average()
    captions = captions * 2
    text = student.frozen[0].text(student.frozen[0].text.rows(captions))
    shape = (len(captions), CHANNELS, SIZE // PATCH, SIZE // PATCH)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    levels = [TIMESTEPS - TIMESTEPS * step // steps for step in range(steps + 1)]
    for level, following in zip(levels[:-1], levels[1:], strict=True):
        image = student(latent, torch.full((len(captions),), level), text)
        latent = ddim(latent, image, KEPT[level], KEPT[following])
    save_pictures(autoencoder.decode(latent), output)


def export_lcm() -> None:
    student = Student()
    run = Run("lcm", student)
    run.use_average()
    save_file(student.lora.file(), LCM_WEIGHTS, {"steps": json.dumps({"lcm": run.step})})
    print(f"{LCM_WEIGHTS} ({LCM_WEIGHTS.stat().st_size / 1e6:.2f} MB), step {run.step}")
