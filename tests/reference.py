"""Edits with Direct Inversion written out plainly: explicit attention maps, float64, a call for each row."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Protocol

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import V_PREDICTION
from torch import Tensor

from palimpsest.host.files.trajectory import Trajectory

MapEdit = Callable[[int, Tensor, Tensor], Tensor]
After = Callable[[int, Tensor, dict[str, list[Tensor]]], Tensor]
"""Takes a step, the target's x after it, and the cross-attention maps that "source" and "target" attended by in each
layer, [b, heads, positions, tokens]; returns the x to go on with."""


def swapped(mapper: Tensor, steps: int) -> MapEdit:
    """Word swap for the first steps: A_source M."""
    return lambda step, source, own: source @ mapper.double() if step < steps else own


class Parts(Protocol):
    """What an edit is made of; the conditionings are the host's."""

    model: ModelPatcher
    trajectory: Trajectory
    sigmas: Tensor
    source: list
    target: list
    negative: list


Attend = Callable[[int, str, tuple, Tensor, Tensor, Tensor], Tensor]
"""Takes a step, a role ("source", "target" or "negative"), a layer (kind, block, number, index) and its projected
queries, keys and values [b, heads, positions or tokens, d]; returns the attention's result [b, heads, positions, d]."""


def explicit(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)


def in_float64(model: ModelPatcher) -> tuple[UNetModel, Callable[[Tensor, Tensor, list, dict], Tensor]]:
    """A copy of the model's UNet, and eps of sampler-space x [b, c, h, w] at a sigma for a conditioning and options."""
    unet = pickle.loads(pickle.dumps(model.model.diffusion_model)).double()
    unet.dtype = torch.float64
    sampling = model.get_model_object("model_sampling")
    table = sampling.sigmas.double()

    def predict(x: Tensor, sigma: Tensor, prompt: list, options: dict) -> Tensor:
        timestep = (table - sigma).abs().argmin()[None].double()
        signal = (1 + sigma**2) ** -0.5  # sqrt(alpha_bar)
        z = x * signal
        output = unet(z, timestep, prompt[0][0].double(), transformer_options=options)
        return signal * (output + sigma * z) if isinstance(sampling, V_PREDICTION) else output

    return unet, predict


def classic_run(
    parts: Parts,
    cfg: float,
    attend: Attend,
    feature: Callable[[int, str, tuple, Tensor], Tensor] = lambda step, role, block, h: h,
    after: Callable[[int, Tensor], Tensor] = lambda step, x: x,
    share: float = 0.0,
    virtual: bool = False,
) -> Tensor:
    """The target's final x of DDIM in float64 (Euler in sigma); the source is its stored inversion at every step.

    share: how much of the prompt parts.empty there is in the negative. virtual: whether the noise that the source
    really has, less what is predicted for it, is added to the target's: an edit without inversion.

    Every row runs alone, source first, so that no context is tiled and nothing is shared but what `attend` and
    `feature` (step, role, block, residual features) keep.
    """
    unet, predict = in_float64(parts.model)
    step, role = 0, ""

    def attention(kind: str):
        def replace(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
            q, k, v = (t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
            place = (kind, *options["block"], options["block_index"])
            return attend(step, role, place, q, k, v).transpose(1, 2).flatten(2)

        return replace

    for number, block in enumerate(unet.output_blocks):
        last = block[0].out_layers[-1]
        last.register_forward_hook(lambda m, i, h, block=("output", number): feature(step, role, block, h))
    blocks = [(name, i) for name in ("input", "middle", "output") for i in range(12)]
    replace = {name: dict.fromkeys(blocks, attention(kind)) for name, kind in (("attn1", "self"), ("attn2", "cross"))}
    sigmas = parts.sigmas.double()
    x = parts.trajectory.states[0].double()
    for step, sigma in enumerate(sigmas[:-1]):
        rows = {"source": parts.trajectory.states[step].double(), "target": x, "negative": x}
        if share:
            rows["empty"] = x
        eps = {}
        for role, row in rows.items():
            eps[role] = predict(row, sigma, getattr(parts, role), {"patches_replace": replace})
        negative = eps["negative"] if not share else (1 - share) * eps["negative"] + share * eps["empty"]
        guided = negative + cfg * (eps["target"] - negative)
        if virtual:
            guided = guided + (rows["source"] - parts.trajectory.states[-1].double()) / sigma - eps["source"]
        x = x + (sigmas[step + 1] - sigma) * guided
        x = after(step, x)
    return x


def classic_p2p(
    parts: Parts,
    edited: MapEdit,
    self_: int,
    cfg: float,
    after: After | None = None,
    share: float = 0.0,
    virtual: bool = False,
) -> Tensor:
    """The target's final x: its cross-attention maps are edited(step, A_source, A_target), [b, heads, positions,
    tokens], its self-attention maps A_source for `self_` steps.
    """
    maps: dict[tuple, Tensor] = {}
    attended: dict[str, list[Tensor]] = {"source": [], "target": [], "negative": [], "empty": []}

    def attend(step: int, role: str, place: tuple, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own, (kind, *_) = explicit(q, k), place
        if role == "source":
            maps[place] = own
        elif role == "target" and kind == "cross":
            own = edited(step, maps[place], own)
        elif role == "target" and kind == "self" and step < self_:
            own = maps[place]
        if kind == "cross":
            attended[role].append(own)
        return own @ v

    def stepped(step: int, x: Tensor) -> Tensor:
        x = x if after is None else after(step, x, attended)
        for layers in attended.values():
            layers.clear()
        return x

    return classic_run(parts, cfg, attend, after=stepped, share=share, virtual=virtual)
