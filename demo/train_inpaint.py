"""The inpainting model's training: stages `inpaint` and `inpaint-export` of `python dev.py train`.

As in GLIDE (arXiv 2112.10741, section 2.4) and Stable Diffusion's inpainting checkpoints: the shipped model is trained
further with parts of the picture hidden, told a mask and the picture without what it hides in further channels of its
input, whose weights begin at zero; captions are dropped in 20 % of the cases. What is hidden is a box, a blob, or what
an edit of the scene would change. Only what is added to the first convolution and a LoRA are trained.
"""

from __future__ import annotations

import json
import math
import random
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import comfy.utils
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import interpolate, max_pool2d

from . import edits, scenes
from .data import as_pixels
from .denoiser import ALPHA_BAR, TIMESTEPS
from .distil import Lora, frozen
from .model import FIRST, INPAINT_WEIGHTS, PATCH, SIZE, Autoencoder, widened
from .run import CHECKPOINTS, Run, fitted_autoencoder, save
from .team import Team
from .text import attention

FOLDER = CHECKPOINTS / "inpaint"
FILES, EDITS = 8, 250  # of edits, and how many in each
DROPOUT = 0.2  # of captions
RANK = 16  # 2.5 MB in fp16
SHOWN = 0.25  # weight of an error where the picture is shown
BOXES, BLOBS = 0.25, 0.25  # shares of the masks; the rest are what an edit changes
GROWN = (0, 4, 8)  # pixels by which a mask may be grown


class Inpainter(nn.Module):
    """The shipped model with further input channels and a LoRA; the two additions alone are trained."""

    def __init__(self) -> None:
        super().__init__()
        denoiser = frozen()
        first = denoiser.unet.input_blocks[0][0]
        first.weight = nn.Parameter(widened(first.weight), requires_grad=False)
        self.frozen = (denoiser,)  # no submodule: it is neither trained nor saved
        self.first = nn.Parameter(torch.zeros_like(first.weight))
        self.lora = Lora(denoiser.unet, RANK, without=FIRST)

    def forward(self, noisy: Tensor, timestep: Tensor, text: Tensor, beside: Tensor) -> Tensor:
        """v [b, c, h, w] of noisy latents and embeddings, told [b, 1 + c, h, w] beside the latents."""
        unet = self.frozen[0].unet
        weights = self.lora.patched(unet)
        weights[f"{FIRST}.weight"] = unet.get_submodule(FIRST).weight + self.first
        options = {"transformer_options": {"optimized_attention_override": attention}}
        return functional_call(unet, weights, (torch.cat([noisy, beside], 1), timestep.float(), text), options)

    def file(self) -> dict[str, Tensor]:
        """As the host's LoRA loaders take it, in fp16."""
        return self.lora.file() | {f"diffusion_model.{FIRST}.diff": self.first.detach().half().contiguous()}


class Examples(NamedTuple):
    """Pictures [n, 3, 128, 128] uint8, what an edit of each would change [n, 1, 128, 128] bool, and captions."""

    pictures: Tensor
    changed: Tensor
    captions: list[str]


def make_examples(processes: int) -> Examples:
    """Edits of all kinds, before and after; those on disk stay."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    paths = [FOLDER / f"{number}.pt" for number in range(FILES)]
    with ProcessPoolExecutor(processes) as pool:
        for number in pool.map(_make_file, [number for number in range(FILES) if not paths[number].exists()]):
            print(f"edits {number * EDITS} to {(number + 1) * EDITS}", flush=True)
    made = [torch.load(path) for path in paths]
    pictures, changed = (torch.cat([file[key] for file in made]) for key in ("pictures", "changed"))
    return Examples(pictures, changed, [caption for file in made for caption in file["captions"]])


def _make_file(number: int) -> int:
    rng = random.Random(f"inpaint {number}")
    drawn, changed, captions = [], [], []
    for index in range(EDITS):
        edit = edits.draw(rng, edits.EDITS[index % len(edits.EDITS)])
        pair = [scenes.render(scene) for scene in (edit.source, edit.target)]
        drawn += pair
        changed += 2 * [scenes.changed(*pair)]
        captions += [edit.source.caption, edit.target.caption]
    pictures = torch.from_numpy((np.stack(drawn) * 255 + 0.5).astype(np.uint8)).movedim(-1, 1).contiguous()
    made = {"pictures": pictures, "changed": torch.from_numpy(np.stack(changed))[:, None], "captions": captions}
    save(made, FOLDER / f"{number}.pt")
    return number


def masks(changed: Tensor, generator: torch.Generator) -> Tensor:
    """What is hidden [b, 1, 128, 128], 1 or 0: a box, a blob or what an edit changes, grown a little."""
    hidden = []
    for own in changed.float():
        kind = float(torch.rand((), generator=generator))
        mask = box(generator) if kind < BOXES else blob(generator) if kind < BOXES + BLOBS else own
        grown = GROWN[int(torch.randint(0, len(GROWN), (), generator=generator))]
        hidden.append(max_pool2d(mask, 2 * grown + 1, 1, grown))
    return torch.stack(hidden)


def box(generator: torch.Generator) -> Tensor:
    """[1, 128, 128] with sides of a fifth of the picture's to all of it."""
    height, width = (SIZE * (0.2 + 0.8 * torch.rand(2, generator=generator))).long().tolist()
    top = int(torch.randint(0, SIZE - height + 1, (), generator=generator))
    left = int(torch.randint(0, SIZE - width + 1, (), generator=generator))
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, top : top + height, left : left + width] = 1
    return mask


def blob(generator: torch.Generator) -> Tensor:
    """[1, 128, 128]: where smooth noise is large, a tenth to six tenths of the picture."""
    field = interpolate(torch.randn((1, 1, 5, 5), generator=generator), (SIZE, SIZE), mode="bicubic")[0]
    share = 0.1 + 0.5 * torch.rand((), generator=generator)
    return (field > field.flatten().quantile(1 - share)).float()


def told(autoencoder: Autoencoder, pixels: Tensor, hidden: Tensor) -> Tensor:
    """What the host's InpaintModelConditioning and its UNet make of pixels in [-1, 1] and a mask of zeros and ones:
    the mask at the latent's size, and the latent of the picture with grey in the mask."""
    side = SIZE // PATCH
    mask = comfy.utils.common_upscale(hidden, side, side, "bilinear", "center").round()
    return torch.cat([mask, autoencoder.encode(pixels * (1 - hidden))], 1)


def train_inpaint(minutes: float, rate: float, decay: bool, fresh: bool, batch: int, processes: int) -> None:
    inpainter = Inpainter()
    run = Run("inpaint", inpainter, fresh)
    pictures, changed, captions = make_examples(processes)
    autoencoder, text = fitted_autoencoder(), inpainter.frozen[0].text
    rows, uncaptioned = text.rows(captions), text.rows([""])
    # A channel counts as much as it moves the pixels: outlines and colours show in the first ones, texture in the last.
    weight = autoencoder.basis.norm(dim=1).view(-1, 1, 1)
    weight = weight / weight.mean()
    print(f"{len(captions)} pictures, {sum(p.numel() for p in run.parameters)} parameters", flush=True)
    share = batch // processes

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(0, len(captions), (share,), generator=generator)
        dropped = torch.rand((share, 1), generator=generator) < DROPOUT
        strata = (torch.arange(share) + torch.rand(share, generator=generator)) / share
        # Half of them from the third of the noise levels at which things take shape.
        strata = strata + 0.5 / math.tau * (math.tau * strata).sin()
        timestep = (strata * TIMESTEPS).long().clamp(0, TIMESTEPS - 1)
        alpha_bar = ALPHA_BAR[timestep].view(-1, 1, 1, 1)
        with torch.no_grad():
            pixels = as_pixels(pictures[chosen])
            clean = autoencoder.encode(pixels)
            beside = told(autoencoder, pixels, masks(changed[chosen], generator))
            embedded = text(torch.where(dropped, uncaptioned, rows[chosen]))
        noise = torch.randn(clean.shape, generator=generator)
        noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
        v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean
        counted = SHOWN + (1 - SHOWN) * beside[:, :1]
        return ((inpainter(noisy, timestep, embedded, beside) - v).square() * weight * counted).mean()

    team = Team(run.parameters, loss, processes, run.step)
    for _ in run.steps(minutes, rate, decay):
        run.update(team.backward())


def export_inpaint() -> None:
    inpainter = Inpainter()
    run = Run("inpaint", inpainter)
    run.use_average()
    save_file(inpainter.file(), INPAINT_WEIGHTS, {"steps": json.dumps({"inpaint": run.step})})
    print(f"{INPAINT_WEIGHTS} ({INPAINT_WEIGHTS.stat().st_size / 1e6:.2f} MB), step {run.step}")
