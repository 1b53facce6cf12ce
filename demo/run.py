"""One stage's training: optimisers, schedule, averaged weights and checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from .clip import CLIP_WEIGHTS
from .flow import FLOW_WEIGHTS
from .model import WEIGHTS, Autoencoder
from .muon import Muon

CHECKPOINTS = Path(__file__).parent / "checkpoints"
ENCODER = CHECKPOINTS / "encoder.pt"
CAPTION_DROPOUT = 0.12
# Of each stage: the shipped file and the prefix of its weights there.
SHIPPED = {
    "diffusion": (WEIGHTS, ""),
    "decoder": (WEIGHTS, "vae.decoder."),
    "flow": (FLOW_WEIGHTS, ""),
    "clip": (CLIP_WEIGHTS, ""),
}


class Run:
    """One stage's training: optimisers, schedule, averaged weights and checkpoint."""

    def __init__(self, name: str, module: nn.Module, fresh: bool = False) -> None:
        self.path = CHECKPOINTS / f"{name}.pt"
        self.name, self.module, self.step, self.losses, self.memory = name, module, 0, [], 0.0
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        matrices = [p for n, p in module.named_parameters() if p.requires_grad and is_hidden_matrix(n, p)]
        inner = {id(p) for p in matrices}
        rest = [p for p in self.parameters if id(p) not in inner]
        # A step of an orthogonal matrix may be four times as large.
        self.optimizers = {torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.01, fused=True): 1.0}
        if matrices:
            self.optimizers = {Muon(matrices, lr=0.0): 4.0} | self.optimizers
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
        elif name in SHIPPED and (shipped_file := SHIPPED[name][0]).exists():
            weights, steps = shipped(shipped_file)
            prefix = SHIPPED[name][1]
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
    """Weights between two hidden layers: neither embeddings nor what first reads or last writes, nor modulations."""
    return parameter.ndim > 1 and not name.startswith(ENDS) and not any(part in name for part in BESIDE)


ENDS = ("unet.input_blocks.0.", "unet.out.", "text.tokens")
ENDS += ("network.input_hint_block.0.",)
ENDS += ("image", "tokens")  # of the model that follows instructions
ENDS += ("img_in.", "txt_in.", "vector_in.", "time_in.", "final_layer.")  # of Flux
ENDS += ("first",)  # of the inpainting model
BESIDE = ("embedding", "_mod.lin.", ".modulation.lin.", "lora.")


def save(state: dict, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def shipped(path: Path = WEIGHTS) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The weights of a file that the pack ships, and how many steps each stage had taken."""
    with safe_open(path, "pt") as file:
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


def save_pictures(pixels: Tensor, output: Path) -> None:
    """Of [n, 3, height, width] in [-1, 1], eight in a row."""
    lines = [torch.cat([*line], 2) for line in pixels.clamp(-1, 1).split(8)]
    Image.fromarray(((torch.cat(lines, 1).movedim(0, -1) + 1) * 127.5).byte().numpy()).save(output)
    print(output)
