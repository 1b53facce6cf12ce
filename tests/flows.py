"""Tiny flow transformers of random weights in the host's own classes, with prompts as their text encoders give them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import comfy.supported_models as supported
import torch
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from comfy.supported_models_base import BASE
from torch import Tensor

WIDTH = 32  # of the prompts' embeddings
POOLED = 16  # and of the pooled ones
HIDREAM_T5 = 8  # HiDream's T5 part is of one length, whatever the prompt
HIDREAM_LLAMA = 3  # layers of its other part


@dataclass(frozen=True)
class Flow:
    """A tiny flow model, and where the tokens stand in the attention of its main blocks."""

    name: str
    make: Callable[[], ModelPatcher]  # a fresh one, each time with the same weights
    prompt: Callable[[int, int], list]  # seed, tokens -> CONDITIONING
    latent: tuple[int, ...]  # as the host's sampler sees it
    blocks: tuple[str, ...]  # attributes of diffusion_model that hold the main blocks
    image: int  # image tokens, with their padding
    text: Callable[[int], int]  # text tokens for a prompt of so many
    order: str  # "text image", "image text" or, where the text has attention of its own, "image"
    split: bool  # whether attention gets [batch, heads, tokens, channels], else [batch, tokens, heads * channels]


def model(config: type[BASE], unet: dict, seed: int = 0) -> ModelPatcher:
    """A model of random weights, as the host's loader makes one of a checkpoint of that configuration."""
    parts = config(copy.deepcopy(unet))
    parts.set_inference_dtype(torch.float32, None)
    made = parts.get_model({}, device=torch.device("cpu"))
    randomise(made.diffusion_model, seed)
    device = comfy.model_management.get_torch_device()
    return CoreModelPatcher(made, load_device=device, offload_device=torch.device("cpu"))


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Gives it weights that keep activations at about one and open every gate."""
    generator = torch.Generator().manual_seed(seed)
    for name, weights in module.state_dict().items():
        noise = torch.randn(weights.shape, generator=generator)
        if weights.ndim == 1:
            noise = 1.5 + 0.1 * noise if name.endswith("weight") else 0.1 * noise  # of a norm, or a bias
        elif name.endswith("weight"):
            noise /= math.sqrt(weights[0].numel())
        weights.copy_(noise)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompt(pooled: bool = False, mask: bool = False, **options) -> Callable[[int, int], list]:
    """Makes prompts with, beside their embeddings, a pooled one or a mask of ones; `options` stand in all of them."""

    def make(seed: int, tokens: int) -> list:
        values = dict(options)
        if pooled:
            values["pooled_output"] = randn(seed + 1000, 1, POOLED)
        if mask:
            values["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
        return [[randn(seed, 1, tokens, WIDTH), values]]

    return make


def hidream_prompt(seed: int, tokens: int) -> list:
    """T5 is cut and padded to one length; the prompt's own is that of every layer of Llama."""
    llama = randn(seed + 2000, 1, HIDREAM_LLAMA, tokens, WIDTH)
    values = {"pooled_output": randn(seed + 1000, 1, POOLED), "conditioning_llama3": llama}
    return [[randn(seed, 1, HIDREAM_T5, WIDTH), values]]


FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": POOLED,
    "context_in_dim": WIDTH,
    "hidden_size": 32,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
    "yak_mlp": False,
    "txt_norm": False,
}
FLUX2 = FLUX | {
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "vec_in_dim": None,
    "mlp_ratio": 3.0,
    "axes_dim": [4, 4, 4, 4],
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "ops_bias": False,
    "guidance_embed": True,
    "global_modulation": True,
    "mlp_silu_act": True,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
    "txt_ids_dims": [3],
}
CHROMA = {key: FLUX[key] for key in FLUX if key not in ("guidance_embed", "yak_mlp", "txt_norm")} | {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": None,
    "in_dim": 64,  # two times 16 and 32, which the class has written out
    "out_dim": 32,
    "hidden_dim": 32,
    "n_layers": 2,
}
SD3 = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "depth": 2,  # as many heads, of 64 channels each
    "num_blocks": 3,
    "input_size": None,
    "adm_in_channels": POOLED,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 128}},
    "num_patches": 64,  # of latents up to 16 x 16
    "pos_embed_max_size": 8,
    "pos_embed_scaling_factor": None,
    "x_block_self_attn_layers": [],
}
SD35_MEDIUM = SD3 | {"qk_norm": "rms", "x_block_self_attn_layers": [0, 1]}
QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (4, 6, 6),
}
LUMINA2 = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 36,
    "cap_feat_dim": WIDTH,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 3,
    "n_kv_heads": 1,
    "axes_dims": [4, 4, 4],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 4.0,
    "multiple_of": 32,
}
Z_IMAGE = LUMINA2 | {
    "dim": 256,  # no less: the class has the modulation's width written out
    "n_heads": 4,
    "n_kv_heads": 4,
    "axes_dims": [16, 24, 24],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 1.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 48,
    "out_dim": 16,
    "num_heads": 2,
    "ffn_dim": 96,
    "num_layers": 3,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "in_dim": 16,
    "text_dim": WIDTH,
}
HIDREAM = {
    "image_model": "hidream",
    "attention_head_dim": 16,
    "axes_dims_rope": [8, 4, 4],
    "caption_channels": [WIDTH, WIDTH],
    "max_resolution": [128, 128],
    "in_channels": 16,
    "llama_layers": [0, 1, 2, 2],  # one for each block
    "num_attention_heads": 2,
    "num_routed_experts": 2,
    "num_activated_experts": 2,  # all: choosing among them would make the velocity jump
    "num_layers": 2,
    "num_single_layers": 2,
    "out_channels": 16,
    "patch_size": 2,
    "text_emb_dim": POOLED,
}


def same(tokens: int) -> int:
    return tokens


def padded(tokens: int) -> int:
    return math.ceil(tokens / 32) * 32


IMAGE, VIDEO = (1, 16, 8, 8), (1, 16, 1, 8, 8)
STREAMS = ("double_blocks", "single_blocks")


def _flow(
    name: str,
    config: type[BASE],
    unet: dict,
    prompt: Callable[[int, int], list],
    blocks: tuple[str, ...],
    latent: tuple[int, ...] = IMAGE,
    image: int = 16,
    text: Callable[[int], int] = same,
    order: str = "text image",
    split: bool = True,
) -> Flow:
    return Flow(name, lambda: model(config, unet), prompt, latent, blocks, image, text, order, split)


_FLOWS = [
    _flow("Flux", supported.FluxSchnell, FLUX, prompt(pooled=True), STREAMS),
    _flow("Flux dev", supported.Flux, FLUX | {"guidance_embed": True}, prompt(pooled=True, guidance=3.5), STREAMS),
    _flow(
        "Flux.2",
        supported.Flux2,
        FLUX2,
        prompt(mask=True, guidance=3.5),
        STREAMS,
        latent=(1, 128, 4, 4),
        text=lambda tokens: max(tokens, 512),
    ),
    _flow("Chroma", supported.Chroma, CHROMA, prompt(), STREAMS),
    _flow("SD3", supported.SD3, SD3, prompt(pooled=True), ("joint_blocks",), split=False),
    _flow("SD3.5 medium", supported.SD3, SD35_MEDIUM, prompt(pooled=True), ("joint_blocks",), split=False),
    _flow("Qwen-Image", supported.QwenImage, QWEN, prompt(), ("transformer_blocks",), latent=VIDEO),
    _flow("Lumina2", supported.Lumina2, LUMINA2, prompt(mask=True), ("layers",)),
    _flow("Z-Image", supported.ZImage, Z_IMAGE, prompt(mask=True), ("layers",), image=32, text=padded),
    _flow(
        "Wan",
        supported.WAN21_T2V,
        WAN,
        prompt(),
        ("blocks",),
        latent=(1, 16, 2, 8, 8),
        image=32,
        order="image",
        split=False,
    ),
    _flow(
        "HiDream",
        supported.HiDream,
        HIDREAM,
        hidream_prompt,
        ("double_stream_blocks", "single_stream_blocks"),
        text=lambda tokens: HIDREAM_T5 + 2 * tokens,
        order="image text",
        split=False,
    ),
]
FLOWS: dict[str, Flow] = {flow.name: flow for flow in _FLOWS}
