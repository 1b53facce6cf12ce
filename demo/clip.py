"""A CLIP of the demo world that sees through noise, as CLIP guidance needs it (GLIDE, arXiv 2112.10741, section 2.3).

The image side looks at a latent and its timestep with the first half of the demo model's UNet, which stays as it is and
has seen every noise level; a small transformer learns to read a picture's words off what that half tells. The text side
is the demo model's text encoder, trained further. Both end in embeddings of length 1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel, forward_timestep_embed
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize, pixel_unshuffle

from ..host.quote import quoted
from .model import CHANNELS, PATCH, SIZE, TEXT, UNET, WEIGHTS, Autoencoder, part
from .scenes import MOST_WORDS, WORDS
from .text import TextEncoder, attention

CLIP_WEIGHTS = Path(__file__).parent / "demo-clip.safetensors"

TEXT_TOKENS = MOST_WORDS + 2  # a caption's words between start and end
EMBEDDING = 128
SHARPEST = 100.0  # that the product of two embeddings is multiplied by
WIDTH, HEADS, DEPTH = 128, 4, 2
FINE = 2  # the last block of 16 x 16 positions in the UNet's first half; the last of 8 x 8 and the middle follow
FEATURES = 4 * UNET["model_channels"] + 2 * 2 * UNET["model_channels"]


class Eye(nn.Module):
    """The first half of the demo model's UNet, told nothing: [b, 64 positions, FEATURES] of latents at timesteps."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNetModel(
            **copy.deepcopy(UNET), device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init
        )
        del self.unet.output_blocks, self.unet.out
        self.register_buffer("unsaid", torch.zeros(1, TEXT["max_position_embeddings"], TEXT["hidden_size"]))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        embedded = timestep_embedding(timestep.float(), UNET["model_channels"]).to(x.dtype)
        embedded, unsaid = self.unet.time_embed(embedded), self.unsaid.expand(len(x), -1, -1)
        seen = []
        for block in [*self.unet.input_blocks, self.unet.middle_block]:
            options = {"optimized_attention_override": attention, "transformer_index": 0}
            x = forward_timestep_embed(block, x, embedded, unsaid, options)
            seen.append(x)
        features = torch.cat([pixel_unshuffle(seen[FINE], 2), seen[-2], seen[-1]], 1)
        return features.flatten(2).mT


class Reader(nn.Module):
    """Embeddings [b, EMBEDDING] of what the eye tells."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, WIDTH)
        self.position_embedding = nn.Parameter(torch.randn((SIZE // PATCH // 2) ** 2 + 1, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(_Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.leave = nn.Linear(WIDTH, EMBEDDING, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        x = self.enter(layer_norm(features, features.shape[-1:]))
        x = torch.cat([x.new_zeros(len(x), 1, WIDTH), x], 1) + self.position_embedding  # the first collects
        for block in self.blocks:
            x = block(x)
        return self.leave(self.norm(x[:, 0]))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(attention(None, *self.qkv(self.norms[0](x)).chunk(3, -1), HEADS))
        return x + self.mlp(self.norms[1](x))


class Judge(nn.Module):
    """What is trained: both ends that lead to embeddings of length 1, and the scale of their product."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.reader = TextEncoder(), Reader()
        self.leave = nn.Linear(TEXT["hidden_size"], EMBEDDING, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.7))  # its logarithm

    def said(self, rows: Tensor) -> Tensor:
        """[b, EMBEDDING] of captions' token rows [b, tokens]."""
        rows = rows[:, :TEXT_TOKENS]
        ends = (rows == self.text.row[self.text.padding]).int().argmax(1)
        return normalize(self.leave(self.text(rows)[torch.arange(len(rows)), ends]), dim=-1)

    def seen(self, features: Tensor) -> Tensor:
        return normalize(self.reader(features), dim=-1)


class DemoClip(nn.Module):
    """The eye and the judge, for use: embeddings [b, EMBEDDING] of length 1 of latents, of pictures and of captions."""

    shape = (CHANNELS, SIZE // PATCH, SIZE // PATCH)  # of a latent

    def __init__(self) -> None:
        super().__init__()
        self.eye, self.judge, self.autoencoder = Eye(), Judge(), Autoencoder()

    def image(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Of latents x = sqrt(alpha_bar) z + sqrt(1 - alpha_bar) noise [b, *shape] at timesteps [b].

        The timestep of clean ones is 0.
        """
        return self.judge.seen(self.eye(x, timestep))

    def picture(self, pictures: Tensor) -> Tensor:
        """Of pictures [b, 128, 128, 3] in 0..1, as the host has them."""
        latent = self.autoencoder.encode(pictures.movedim(-1, 1) * 2 - 1)
        return self.image(latent, latent.new_zeros(len(latent)))

    def text(self, captions: Sequence[str]) -> Tensor:
        """Raises ValueError for what is outside the demo model's language."""
        for caption in captions:
            words = caption.lower().replace(",", " ").split()
            if unknown := [word for word in words if word not in WORDS]:
                raise ValueError(
                    f"The demo CLIP does not know the word {quoted(unknown[0])}: see Demo Scene for its words."
                )
            if len(words) > MOST_WORDS:
                raise ValueError(f"The demo CLIP reads {MOST_WORDS} words, not {len(words)}: shorten the prompt.")
        return self.judge.said(self.judge.text.rows(list(captions)).to(self.judge.scale.device))


def load_clip(path: Path = CLIP_WEIGHTS, model: Path = WEIGHTS) -> DemoClip:
    """In fp32, frozen. Gradients flow to latents also where it is loaded in inference mode."""
    with torch.inference_mode(False):
        clip, judged, drawn = DemoClip(), load_file(path), load_file(model)
        unet = part(drawn, "unet.")
        clip.autoencoder.load_state_dict(part(drawn, "vae."))
        clip.eye.unsaid.copy_(judged.pop("unsaid"))
        clip.eye.unet.load_state_dict({key: unet[key] for key in clip.eye.unet.state_dict()})
        clip.judge.load_state_dict({key: value.float() for key, value in judged.items()})
        return clip.eval().requires_grad_(False)
