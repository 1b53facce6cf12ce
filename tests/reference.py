"""Prompt-to-Prompt with Direct Inversion written out plainly: explicit attention maps, float64, a call for each row."""

from __future__ import annotations

import pickle
from typing import Protocol

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from palimpsest.host.trajectory import Trajectory


class Parts(Protocol):
    """What an edit is made of; the conditionings are the host's."""

    model: ModelPatcher
    trajectory: Trajectory
    sigmas: Tensor
    source: list
    target: list
    negative: list


def classic_p2p(parts: Parts, mapper: Tensor, cross: int, self_: int, cfg: float) -> Tensor:
    """The target's final x: A_target := A_source M for `cross` steps in cross-attention, A_source for `self_` in self-.

    Every row runs alone, so that no context is tiled and nothing is shared but the maps. DDIM is Euler in sigma; the
    source is set to its stored inversion at every step.
    """
    unet = pickle.loads(pickle.dumps(parts.model.model.diffusion_model)).double()
    unet.dtype = mapper.double().dtype
    maps: dict[tuple, Tensor] = {}
    step, role = 0, ""

    def attention(kind: str):
        def replace(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
            q, k, v = (t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
            own = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
            place = (kind, *options["block"], options["block_index"])
            if role == "source":
                maps[place] = own
            elif role == "target" and kind == "cross" and step < cross:
                own = maps[place] @ mapper.double()
            elif role == "target" and kind == "self" and step < self_:
                own = maps[place]
            return (own @ v).transpose(1, 2).flatten(2)

        return replace

    blocks = [(name, i) for name in ("input", "middle", "output") for i in range(12)]
    replace = {name: dict.fromkeys(blocks, attention(kind)) for name, kind in (("attn1", "self"), ("attn2", "cross"))}
    sigmas = parts.sigmas.double()
    table = parts.model.get_model_object("model_sampling").sigmas.double()
    x = parts.trajectory.states[0].double()
    for step, sigma in enumerate(sigmas[:-1]):
        timestep = (table - sigma).abs().argmin()[None].double()
        rows = {"source": parts.trajectory.states[step].double(), "target": x, "negative": x}
        eps = {}
        for role, row in rows.items():
            context = getattr(parts, role)[0][0].double()
            z = row / (1 + sigma**2).sqrt()
            eps[role] = unet(z, timestep, context, transformer_options={"patches_replace": replace})
        x = x + (sigmas[step + 1] - sigma) * (eps["negative"] + cfg * (eps["target"] - eps["negative"]))
    return x
