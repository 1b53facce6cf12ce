"""The flow model's training: stages `flow`, `flow-preview` and `flow-export` of `python dev.py train`.

Latents and conditionings are made once, by the shipped autoencoder and text encoder, which stay as they are: a step
costs the denoiser alone. It is computed in fp32, which processors without bfloat16 instructions do ten times as fast.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import comfy.ops
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, QKNorm, SingleStreamBlock, timestep_embedding
from comfy.ldm.flux.model import Flux
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import scaled_dot_product_attention, silu

from . import data
from .flow import FLOW_WEIGHTS, FLUX, TEXT_TOKENS
from .model import CHANNELS, PATCH, SIZE, Autoencoder
from .run import CAPTION_DROPOUT, CHECKPOINTS, Run, fitted_autoencoder, save, save_pictures, shipped
from .team import Team
from .text import TextEncoder

EXAMPLES = CHECKPOINTS / "flow-examples.pt"
SIDE = SIZE // PATCH  # of a latent
TEXT_SCALE = 5.0  # brings the text encoder's numbers to about 1
TIME_MEAN, TIME_DEVIATION = 0.4, 1.1  # of the noise levels' logits


class Velocity(Flux):
    """The host's Flux for training: the same layers and the same numbers, with sums that autograd does not refuse."""

    def __init__(self) -> None:
        super().__init__(**FLUX, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
        _, places = self.process_img(torch.zeros(1, CHANNELS, SIDE, SIDE))
        places = torch.cat([torch.zeros(1, TEXT_TOKENS, places.shape[-1]), places], 1)
        turns = self.pe_embedder(places)  # [1, 1, tokens, channels / 2, 2, 2]: rotations, whose first columns suffice
        self.register_buffer(
            "turns", torch.view_as_complex(turns[..., 0].transpose(1, 2).contiguous()), persistent=False
        )
        self.requires_grad_(True)

    def initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif parameter.ndim == 1 or ".lin." in name or name.startswith("final_layer"):
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_uniform_(parameter)
        for layer in (self.txt_in, self.vector_in.in_layer):  # the text encoder's numbers are small
            nn.init.normal_(layer.weight, std=TEXT_SCALE / layer.in_features**0.5)

    def forward(self, noisy: Tensor, time: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        image = self.img_in(rearrange(noisy, "b c (h i) (w j) -> b (h w) (c i j)", i=2, j=2))
        text = self.txt_in(text)
        vector = silu(self.time_in(timestep_embedding(time, 256)) + self.vector_in(pooled))[:, None]
        for block in self.double_blocks:
            image, text = self.double(block, image, text, vector)
        tokens = torch.cat((text, image), 1)
        for block in self.single_blocks:
            tokens = self.single(block, tokens, vector)
        shift, scale = self.final_layer.adaLN_modulation[1](vector).chunk(2, -1)
        image = self.final_layer.linear(modulated(self.final_layer.norm_final(tokens[:, TEXT_TOKENS:]), shift, scale))
        return rearrange(image, "b (h w) (c i j) -> b c (h i) (w j)", h=SIDE // 2, i=2, j=2)

    def double(self, block: DoubleStreamBlock, image: Tensor, text: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        of_image, of_text = block.img_mod.lin(vector).chunk(6, -1), block.txt_mod.lin(vector).chunk(6, -1)
        from_image = self.heads(
            block.img_attn.norm, block.img_attn.qkv(modulated(block.img_norm1(image), *of_image[:2]))
        )
        from_text = self.heads(block.txt_attn.norm, block.txt_attn.qkv(modulated(block.txt_norm1(text), *of_text[:2])))
        seen = self.attention(*(torch.cat(pair, 1) for pair in zip(from_text, from_image, strict=True)))
        text = text + block.txt_attn.proj(seen[:, :TEXT_TOKENS]) * of_text[2]
        image = image + block.img_attn.proj(seen[:, TEXT_TOKENS:]) * of_image[2]
        text = text + mlp(block.txt_mlp, modulated(block.txt_norm2(text), *of_text[3:5])) * of_text[5]
        image = image + mlp(block.img_mlp, modulated(block.img_norm2(image), *of_image[3:5])) * of_image[5]
        return image, text

    def single(self, block: SingleStreamBlock, tokens: Tensor, vector: Tensor) -> Tensor:
        shift, scale, gate = block.modulation.lin(vector).chunk(3, -1)
        inner = block.linear1(modulated(block.pre_norm(tokens), shift, scale))
        projected, hidden = inner.split((3 * self.hidden_size, block.mlp_hidden_dim), -1)
        seen = self.attention(*self.heads(block.norm, projected))
        return tokens + block.linear2(torch.cat((seen, Gelu.apply(hidden)), -1)) * gate

    def heads(self, norm: QKNorm, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, [b, tokens, heads, channels]."""
        q, k, v = projected.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return norm.query_norm(q), norm.key_norm(k), v

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (
            torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * self.turns).flatten(-2) for x in (q, k)
        )
        seen = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return seen.transpose(1, 2).flatten(2)


def mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    return layers[2](Gelu.apply(layers[0](x)))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


class Gelu(torch.autograd.Function):
    """The tanh form by way of the sigmoid, x * sigmoid(x * (A + B * x^2)): three times as fast on a processor."""

    @staticmethod
    def forward(context: FunctionCtx, x: Tensor) -> Tensor:
        gate = (x * x).mul_(GELU_B).add_(GELU_A).mul_(x).sigmoid_()
        context.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(context: FunctionCtx, gradient: Tensor) -> Tensor:
        x, gate = context.saved_tensors
        slope = (x * x).mul_(3 * GELU_B).add_(GELU_A).mul_(x).mul_(1 - gate).add_(1).mul_(gate)
        return slope.mul_(gradient)


GELU_A = 2 * (2 / math.pi) ** 0.5
GELU_B = 0.044715 * GELU_A


def train_flow(minutes: float, rate: float, decay: bool, fresh: bool, batch: int, processes: int) -> None:
    velocity, autoencoder = Velocity(), fitted_autoencoder()
    velocity.initialise()
    run = Run("flow", velocity, fresh)
    latent, text, pooled = examples(autoencoder)
    # A channel counts as much as it moves the pixels: outlines and colours show in the first ones, texture in the last.
    weight = autoencoder.basis.norm(dim=1).view(-1, 1, 1)
    weight = weight / weight.mean()
    print(f"{len(latent)} scenes, {sum(p.numel() for p in velocity.parameters()) / 1e6:.2f} M parameters", flush=True)
    share = batch // processes

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(0, len(latent), (share,), generator=generator)
        dropped = torch.rand(share, generator=generator) < CAPTION_DROPOUT
        said = torch.where(dropped, len(latent), chosen)
        clean = latent[chosen].float()
        noise, time = torch.randn(clean.shape, generator=generator), times(share, generator)
        at = time.view(-1, 1, 1, 1)
        predicted = velocity(at * noise + (1 - at) * clean, time, text[said].float(), pooled[said])
        return ((predicted - (noise - clean)).square() * weight).mean()

    team = Team(run.parameters, loss, processes, run.step)
    for _ in run.steps(minutes, rate, decay):
        mean = team.backward()
        torch.set_num_threads(processes)  # the others wait
        run.update(mean)
        torch.set_num_threads(1)


def examples(autoencoder: Autoencoder) -> tuple[Tensor, Tensor, Tensor]:
    """Of all rendered scenes: latents, texts and pooled texts; those of the empty caption come last. Made once."""
    count = data.SHARD * len(data.shards())
    if EXAMPLES.exists() and len((made := torch.load(EXAMPLES, mmap=True))["latent"]) == count:
        return made["latent"], made["text"], made["pooled"]
    with torch.no_grad():
        latent, captions = data.latents(autoencoder)
        text, pooled = Conditionings().of([*captions, ""])
    save({"latent": latent, "text": text, "pooled": pooled}, EXAMPLES)
    return latent, text, pooled


def times(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels, stratified: mostly logit-normal about those at which things take shape, a fifth anywhere."""
    strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    spread = torch.sigmoid(TIME_MEAN + TIME_DEVIATION * torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4)))
    anywhere = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.2, anywhere, spread)


class Conditionings:
    """What the host makes of captions with the shipped text encoder."""

    def __init__(self) -> None:
        self.encoder = TextEncoder()
        weights, _ = shipped()
        self.encoder.load_state_dict({key: weights[f"text.{key}"].float() for key in self.encoder.state_dict()})

    @torch.no_grad()
    def of(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings of the first tokens in fp16, [n, TEXT_TOKENS, 128], and of each caption's end."""
        texts, pooled = [], []
        for first in range(0, len(captions), 500):
            rows = self.encoder.rows(captions[first : first + 500])[:, :TEXT_TOKENS]
            encoded = self.encoder(rows)
            ends = (rows == self.encoder.row[self.encoder.padding]).int().argmax(1)
            texts.append(encoded.half())
            pooled.append(encoded[torch.arange(len(rows)), ends])
        return torch.cat(texts), torch.cat(pooled)


def preview_flow(captions: list[str], output: Path, cfg: float, steps: int, seed: int) -> None:
    """Samples of the checkpoint's averaged weights, eight in a row, two seeds each, by Euler steps of equal length."""
    velocity, autoencoder = Velocity(), fitted_autoencoder()
    Run("flow", velocity).use_average()
    Run("decoder", autoencoder.decoder).use_average()
    captions = captions * 2
    text, pooled = Conditionings().of([""] * len(captions) + captions)
    latent = torch.randn((len(captions), CHANNELS, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for step in range(steps):
            at = torch.full((2 * len(captions),), 1 - step / steps)
            without, with_caption = velocity(latent.repeat(2, 1, 1, 1), at, text.float(), pooled).chunk(2)
            latent = latent - (without + cfg * (with_caption - without)) / steps
        save_pictures(autoencoder.decode(latent), output)


def export_flow() -> None:
    run = Run("flow", Velocity())
    run.use_average()
    tensors = {key: value.half().contiguous() for key, value in run.module.state_dict().items()}
    save_file(tensors, FLOW_WEIGHTS, {"steps": json.dumps({"flow": run.step})})
    print(f"{FLOW_WEIGHTS} ({FLOW_WEIGHTS.stat().st_size / 1e6:.1f} MB), step {run.step}")
