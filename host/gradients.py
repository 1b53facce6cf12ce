"""Gradients through the host's UNet, which runs in inference mode on weights that autograd may not save."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from comfy.controlnet import ControlBase
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

KEY = "palimpsest.gradients"


@contextmanager
def gradients() -> Iterator[None]:
    """Within it autograd works, also in a node. Tensors from outside must be copied before a gradient flows to them."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def differentiable(model: ModelPatcher, checkpointing: bool) -> ModelPatcher:
    """A clone of `model` that gradients flow through, for calls within `gradients()`.

    There each layer works on a copy of its weights, which autograd keeps until the gradient is taken. With
    `checkpointing` every block is run again for its gradient, and neither its copies nor its activations outlive it.
    """
    model = model.clone()
    for name, module in model.model.diffusion_model.named_modules(prefix="diffusion_model"):
        if hasattr(module, "weight_function"):
            for kind in ("weight", "bias"):
                if getattr(module, kind, None) is not None:
                    model.add_weight_wrapper(f"{name}.{kind}", _saveable)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _differentiable_call)
    if checkpointing:
        model.set_model_forward_timestep_embed_patch((ResBlock, _checkpointed_residual))
        model.set_model_forward_timestep_embed_patch((SpatialTransformer, _checkpointed_transformer))
    return model


def _saveable(weight: Tensor) -> Tensor:
    return weight if torch.is_inference_mode_enabled() else weight.clone()


def _checkpointed_residual(layer: ResBlock, x: Tensor, emb: Tensor, *args) -> Tensor:
    return _checkpointed(layer, x, emb)


def _checkpointed_transformer(layer: SpatialTransformer, x: Tensor, emb: Tensor, context: Tensor, options: dict, *args):
    return _checkpointed(layer, x, context, dict(options))  # the host writes the next block's name into its own


def _checkpointed(layer: nn.Module, *args) -> Tensor:
    return checkpoint(layer, *args, use_reentrant=False) if torch.is_grad_enabled() else layer(*args)


def _differentiable_call(
    executor, x: Tensor, timesteps: Tensor, context, y, control, transformer_options: dict, **kwargs
):
    if torch.is_inference_mode_enabled():
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
    x, timesteps, context, y = (
        t.clone() if isinstance(t, Tensor) and t.is_inference() else t for t in (x, timesteps, context, y)
    )
    options = {**transformer_options, "optimized_attention_override": _with_backward}
    if control is not None and "output" in control:
        control, options = _added_later(control, options)
    return executor(x, timesteps, context, y, control, options, **kwargs)


def _added_later(control: dict, options: dict) -> tuple[dict, dict]:
    """A ControlNet's part in the skip connections as a patch: the host would write into what autograd has saved."""
    parts = list(control["output"])

    def add(h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        part = parts.pop() if parts else None
        return h, skip if part is None else skip + part

    patches = options.get("patches", {})
    patches = {**patches, "output_block_patch": [add, *patches.get("output_block_patch", [])]}
    return {**control, "output": []}, {**options, "patches": patches}


def _with_backward(function: Callable, *args, **kwargs) -> Tensor:
    """torch's attention in place of the host's choice, which may be a kernel without a gradient."""
    return attention_pytorch(*args, **kwargs)


class Constant:
    """A ControlNet whose answer is a constant to autograd: gradients neither reach its weights nor pass through it."""

    def __init__(self, control: ControlBase) -> None:
        self.control = control

    def get_control(self, *args) -> dict:
        with torch.no_grad():
            return self.control.get_control(*args)
