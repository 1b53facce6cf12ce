"""What the methods that take gradients hold: with checkpointing and without, beside a row of plain sampling.

Networks of true shape take one gradient of one image in fp32 on torch's meta device, which computes shapes alone; what
is counted is the bytes of all tensors that live at once, weights apart.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable
from unittest.mock import patch

import comfy.ops
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, pytorch_attention
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..guidance.clip_guidance import ClipGuidance, direction
from ..host.branch.judged import Pictures
from ..host.unet.gradients import differentiable, gradients
from .architectures import CONFIGS, UNETS

SIDES = {"sd15": 64, "sdxl": 128}  # of the latent: 512 and 1024 pixels
META = torch.device("meta")
TOKENS = 77
EMBEDDED = 768  # numbers of a picture's embedding by CLIP ViT-L/14
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION |= {"image_size": 224, "patch_size": 14, "hidden_act": "quick_gelu", "num_channels": 3}
VISION |= {"model_type": "clip_vision_model", "projection_dim": EMBEDDED}
VAE_LAYOUT = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
VAE_LAYOUT |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=SIDES, nargs="+", default=list(SIDES))


def run(arguments: argparse.Namespace) -> None:
    print("| model | a gradient for | held, MB | without checkpointing, MB | a plain row, MB |")
    print("|---|---|---|---|---|")
    for kind in arguments.model:
        model = unet(kind)
        plain = most_held(lambda kind=kind, model=model: call(model, kind, prompt(kind)))
        for name, gradient in {"a prompt": prompt_gradient, "CLIP Guidance, ViT-L/14": clip_gradient}.items():
            held, whole = (most_held(gradient(model, kind, checkpointing)) for checkpointing in (True, False))
            print(f"| {kind} | {name} | {held / 1e6:,.0f} | {whole / 1e6:,.0f} | {plain / 1e6:,.0f} |")


def prompt_gradient(model: ModelPatcher, kind: str, checkpointing: bool) -> Callable[[], Tensor]:
    """As Null Text Inversion takes it at each of its steps."""
    model = differentiable(model, checkpointing)

    def work() -> Tensor:
        with gradients():
            embedding = prompt(kind).requires_grad_()
            return torch.autograd.grad(call(model, kind, embedding).square().mean(), embedding)[0]

    return work


def clip_gradient(model: ModelPatcher, kind: str, checkpointing: bool) -> Callable[[], Tensor]:
    """As CLIP Guidance takes it, by a VAE and an ordinary CLIP."""
    judge, side = Pictures(vae(), clip_vision(), checkpointing), SIDES[kind]
    rule = ClipGuidance(1.0, 0.0, 1.0, direction(torch.ones(1, EMBEDDED, device=META)))

    def work() -> Tensor:
        with gradients():
            denoised = torch.empty(1, 4, side, side, device=META)
            return rule.estimated(denoised, 1.0, lambda latent: judge.embed(model.model, latent, 1.0))

    return work


# --- networks of true shape ------------------------------------------------------------------------------------------


def unet(kind: str) -> ModelPatcher:
    config = CONFIGS[kind](UNETS[kind])
    config.set_inference_dtype(torch.float32, None)
    return ModelPatcher(config.get_model({}, device=META), META, META)


def vae() -> VAE:
    """That of SD1.x and SDXL."""
    with META:
        state = AutoencoderKL(ddconfig=VAE_LAYOUT, embed_dim=4).state_dict()
        made = VAE(sd=state, config={"params": {"ddconfig": VAE_LAYOUT, "embed_dim": 4}}, dtype=torch.float32)
    made.first_stage_model.to(META)
    for layer in made.first_stage_model.modules():
        if isinstance(layer, AttnBlock):
            layer.optimized_attention = pytorch_attention
    made.device = META
    return made


def clip_vision() -> ClipVisionModel:
    made = ClipVisionModel(VISION)
    made.model.to(META)
    made.load_device = META
    return made


def prompt(kind: str) -> Tensor:
    return torch.empty(1, TOKENS, UNETS[kind]["context_dim"], device=META)


def call(model: ModelPatcher, kind: str, context: Tensor) -> Tensor:
    side = SIDES[kind]
    x, pooled = torch.empty(1, 4, side, side, device=META), torch.empty(1, 2816, device=META)
    options = {"wrappers": model.wrappers, "callbacks": {}, "patches": {}}
    y = pooled if UNETS[kind]["adm_in_channels"] else None
    return model.model.diffusion_model(x, torch.zeros(1, device=META), context, y, None, options)


# --- counting --------------------------------------------------------------------------------------------------------


def most_held(work: Callable[[], object]) -> int:
    """Bytes of what `work` makes that live at once, at most."""
    with patch.object(comfy.ops, "scaled_dot_product_attention", fused_attention), Held() as held:
        work()
    return held.most


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
    """As graphics cards compute it, which never hold its matrix."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]


class Held(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        given = {storage._cdata for storage in _storages((args, kwargs))}  # of which views show, of weights among them
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self.known:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self.known[key] = storage.nbytes()
        self.now += self.known[key]
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.known.pop(key)


def _storages(values: object) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]
