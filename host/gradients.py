"""Gradients through the host's UNet, which runs in inference mode on weights that autograd may not save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from comfy.controlnet import ControlBase
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from torch.utils.checkpoint import checkpoint

KEY = "palimpsest.gradients"
# How many times the host's estimate for a row a gradient of one image needs, with checkpointing and without: what was
# counted for SD1.5 at 512 pixels and SDXL at 1024 fits into it. A row is the least that the host keeps free of weights.
HELD = {True: 8, False: 40}


@contextmanager
def gradients() -> Iterator[None]:
    """Within it autograd works, also in a node. Tensors from outside must be copied before a gradient flows to them."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def differentiable(model: ModelPatcher, checkpointing: bool) -> ModelPatcher:
    """A clone of `model` that gradients flow through, for calls within `gradients()`; its runs reserve memory for them.

    There each layer works on a copy of its weights, which autograd keeps until the gradient is taken. With
    `checkpointing` every block is run again for its gradient, and neither its copies nor its activations outlive it.
    """
    model = model.clone()
    for name, module in model.model.diffusion_model.named_modules(prefix="diffusion_model"):
        if hasattr(module, "weight_function"):
            for kind in ("weight", "bias"):
                if getattr(module, kind, None) is not None:
                    model.add_weight_wrapper(f"{name}.{kind}", _saveable)
    layers = [(ResBlock, _checkpointed_residual), (SpatialTransformer, _checkpointed_transformer)]

    def call(executor, x: Tensor, timesteps: Tensor, context, y, control, transformer_options: dict, **kwargs):
        if torch.is_inference_mode_enabled():
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        x, timesteps, context, y = (
            t.clone() if isinstance(t, Tensor) and t.is_inference() else t for t in (x, timesteps, context, y)
        )
        options = {**transformer_options, "optimized_attention_override": _with_backward}
        if checkpointing and torch.is_grad_enabled():
            options = _with_patches(options, "forward_timestep_embed_patch", after=layers)
        if control is not None and "output" in control:
            control, options = _added_later(control, options)
        return executor(x, timesteps, context, y, control, options, **kwargs)

    def prepare(executor, model: ModelPatcher, noise_shape: Sequence[int], *args, **kwargs):
        images, *shape = noise_shape
        return executor(model, [images * HELD[checkpointing], *shape], *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, call)
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, prepare)
    return model


def constant_control(cond: dict) -> dict:
    """A processed conditioning whose ControlNet, if it has one, is a constant to autograd."""
    return {**cond, "control": _Constant(cond["control"])} if "control" in cond else cond


def _saveable(weight: Tensor) -> Tensor:
    return weight if torch.is_inference_mode_enabled() else weight.clone()


def _checkpointed_residual(layer: ResBlock, x: Tensor, emb: Tensor, *args) -> Tensor:
    return checkpoint(layer, x, emb, use_reentrant=False)


def _checkpointed_transformer(layer: SpatialTransformer, x: Tensor, emb: Tensor, context: Tensor, options: dict, *args):
    own = dict(options)  # the host writes the next block's name into its own, before this one runs again
    options["transformer_index"] += 1  # as the host does behind each layer that it calls itself
    return checkpoint(layer, x, context, own, use_reentrant=False)


def _with_patches(options: dict, name: str, before: Sequence = (), after: Sequence = ()) -> dict:
    patches = options.get("patches", {})
    return {**options, "patches": {**patches, name: [*before, *patches.get(name, []), *after]}}


def _added_later(control: dict, options: dict) -> tuple[dict, dict]:
    """A ControlNet's part in the skip connections as a patch: the host would write into what autograd has saved."""
    parts = list(control["output"])

    def add(h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        part = parts.pop() if parts else None
        return h, skip if part is None else skip + part

    return {**control, "output": []}, _with_patches(options, "output_block_patch", before=[add])


def _with_backward(function: Callable, *args, **kwargs) -> Tensor:
    """torch's attention in place of the host's choice, which may be a kernel without a gradient."""
    return attention_pytorch(*args, **kwargs)


class _Constant:
    """A ControlNet whose answer is a constant to autograd: gradients neither reach its weights nor pass through it."""

    def __init__(self, control: ControlBase) -> None:
        self.control = control

    def get_control(self, *args) -> dict:
        with torch.no_grad():
            return self.control.get_control(*args)
