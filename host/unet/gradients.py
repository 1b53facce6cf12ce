"""Gradients through the host's UNet, which runs in inference mode on tensors that autograd may not save.

What other nodes have put on the model is written for inference: its weights and tokens are inference tensors, and it
writes into what it was given. Autograd therefore saves copies, of all that a patch computes with and of all weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from comfy.controlnet import ControlBase
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

KEY = "palimpsest.gradients"
ISOLATED = f"{KEY}.isolated"
# How many times the host's estimate for a row a gradient of one image needs, with checkpointing and without: what was
# counted for SD1.5 at 512 pixels and SDXL at 1024 fits into it. A row is the least that the host keeps free of weights.
HELD = {True: 8, False: 40}


@contextmanager
def gradients() -> Iterator[None]:
    """Within it autograd works, also in a node. Tensors from outside must be copied before a gradient flows to them."""
    with torch.inference_mode(False), torch.enable_grad(), _SaveableArguments():
        yield


def differentiable(model: ModelPatcher, checkpointing: bool) -> ModelPatcher:
    """A clone of `model` that gradients flow through, for calls within `gradients()`; its runs reserve memory for them.

    There each layer works on a copy of its weights, which autograd keeps until the gradient is taken. With
    `checkpointing` every block is run again for its gradient, and neither its copies nor its activations outlive it.
    All other calls are the host's own, bit for bit.
    """
    model = model.clone()
    layers = [(ResBlock, _checkpointed_residual), (SpatialTransformer, _checkpointed_transformer)]

    def call(executor, x: Tensor, timesteps: Tensor, context, y, control, transformer_options: dict, **kwargs):
        if torch.is_inference_mode_enabled():
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        options = {**isolated(transformer_options), "optimized_attention_override": _with_backward}
        if checkpointing and torch.is_grad_enabled():
            options = _with_patches(options, "forward_timestep_embed_patch", after=layers)
        if control is not None and "output" in control:
            control, options = _added_later(control, options)
        with _saveable_weights(executor.class_obj):
            return executor(x, timesteps, context, y, control, options, **kwargs)

    def prepare(executor, model: ModelPatcher, noise_shape: Sequence[int], *args, **kwargs):
        images, *shape = noise_shape
        return executor(model, [images * HELD[checkpointing], *shape], *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, call)
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, prepare)
    return model


@contextmanager
def checkpointed(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[None]:
    """Within it the layers of these kinds in `module` are run again for their gradients, instead of kept.

    For networks without patches; no such layer may hold another.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, kinds)]
    before = [vars(layer).copy() for layer in layers]
    for layer in layers:
        layer.forward = _checkpointed_forward(layer)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            vars(layer).update(own)


@contextmanager
def refusing(node: str) -> Iterator[None]:
    """Within it, what lets no gradient through is refused, which runs without one."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{node} takes gradients through the MODEL, but a patch on it lets none through ({reason}): connect the "
            "MODEL from before the node that makes this patch."
        ) from error


def isolated(options: dict) -> dict:
    """Transformer options whose patches may write into what they are given, or have computed with.

    Only those that are there when it is first called.
    """
    if ISOLATED in options:
        return options
    patches = {
        name: [_saving_copies(patch) if callable(patch) else patch for patch in found]
        for name, found in options.get("patches", {}).items()
    }
    if "output_block_patch" in patches:
        patches["output_block_patch"].insert(0, _own_skip)
    replaced = {
        name: {key: _saving_copies(patch) for key, patch in found.items()}
        for name, found in options.get("patches_replace", {}).items()
    }
    return {**options, "patches": patches, "patches_replace": replaced, ISOLATED: True}


def constant_control(cond: dict) -> dict:
    """A processed conditioning whose ControlNet, if it has one, is a constant to autograd."""
    return {**cond, "control": _Constant(cond["control"])} if "control" in cond else cond


class _SaveableArguments(TorchFunctionMode):
    """Gives every operation that autograd records a copy of the inference tensors that it reads."""

    def __torch_function__(self, function: Callable, types, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        given = (*args, *kwargs.values())
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in given):
            name = function.__name__
            written = 1 if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) else 0
            args = (*args[:written], *map(_normal, args[written:]))
            kwargs = {key: value if key == "out" else _normal(value) for key, value in kwargs.items()}
        return function(*args, **kwargs)


class OwnSums(TorchFunctionMode):
    """Within it `x += y`, to torch x.add_(y), makes a new x: the host's CLIP writes into what autograd has saved."""

    def __torch_function__(self, function: Callable, types, args: tuple = (), kwargs: dict | None = None):
        return (Tensor.add if function is Tensor.add_ else function)(*args, **kwargs or {})


def _normal(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


@contextmanager
def _saveable_weights(module: nn.Module) -> Iterator[None]:
    """Within it every layer of `module` works on a copy of its weights, and none of them in fp8.

    Only within: the host keeps layers whose weights pass through a function off its fast kernels.
    """
    functions = [
        (layer, f"{kind}_function")
        for layer in module.modules()
        if hasattr(layer, "weight_function")
        for kind in ("weight", "bias")
        if getattr(layer, kind, None) is not None
    ]
    for layer, name in functions:
        setattr(layer, name, [*getattr(layer, name), _copied])
    try:
        yield
    finally:
        for layer, name in functions:  # whose lists the host may have changed meanwhile
            setattr(layer, name, [function for function in getattr(layer, name) if function is not _copied])


def _copied(weight: Tensor) -> Tensor:
    return weight.clone()


def _saving_copies(patch: Callable) -> Callable:
    def call(*args):
        with saved_tensors_hooks(torch.clone, lambda saved: saved):
            return patch(*args)

    return call


def _own_skip(h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    """The encoder's block has saved the skip connection, or will be run again from it."""
    return h, skip.clone()


def _checkpointed_residual(layer: ResBlock, x: Tensor, emb: Tensor, *args) -> Tensor:
    return _checkpoint(layer, layer, x, emb)


def _checkpointed_transformer(layer: SpatialTransformer, x: Tensor, emb: Tensor, context: Tensor, options: dict, *args):
    own = dict(options)  # the host writes the next block's name into its own, before this one runs again
    options["transformer_index"] += 1  # as the host does behind each layer that it calls itself
    return _checkpoint(layer, layer, x, context, own)


def _checkpoint(run: Callable, layer: nn.Module, *args) -> Tensor:
    return checkpoint(run, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _run_again(layer)))


def _checkpointed_forward(layer: nn.Module) -> Callable[..., Tensor]:
    forward = layer.forward

    def run(*args) -> Tensor:
        with OwnSums():
            return forward(*args)

    return lambda *args: _checkpoint(run, layer, *args)


@contextmanager
def _run_again(layer: nn.Module) -> Iterator[None]:
    """Autograd runs it from within the gradient, where no mode of Python's is in force."""
    with _SaveableArguments(), _saveable_weights(layer):
        yield


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
