"""Facts about the host's MODEL."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_sampling as sampling
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .trajectory import ModelIdentity, Trajectory


def prediction_type(model: ModelPatcher) -> str:
    """ "eps" or "v". Raises ValueError for models that predict anything else."""
    model_sampling = model.get_model_object("model_sampling")
    other = (sampling.CONST, sampling.EDM, sampling.X0)
    if isinstance(model_sampling, other) or not isinstance(model_sampling, sampling.EPS):
        kind = type(model.model).__name__
        raise ValueError(
            f"This MODEL ({kind}) predicts neither noise (eps) nor v, so no inversion here fits it: "
            "load an SD1.x, SD2.x or SDXL checkpoint."
        )
    return "v" if isinstance(model_sampling, sampling.V_PREDICTION) else "eps"


def identity(model: ModelPatcher) -> ModelIdentity:
    """What a trajectory remembers of the model that made it: the first and the last of its parameters."""
    parameters = list(model.model.diffusion_model.parameters())
    weights = [p.detach().flatten()[:32].to("cpu", torch.float32) for p in (parameters[0], parameters[-1])]
    return ModelIdentity(type(model.model).__name__, prediction_type(model), torch.cat(weights))


def add_outermost(model: ModelPatcher, kind: str, key: str, wrapper: Callable, within: str | None = None) -> None:
    """Adds a wrapper around all others of its kind that are on the model but `within`'s, whichever node came first."""
    model.add_wrapper_with_key(kind, key, wrapper)
    wrappers = model.wrappers[kind]
    outer = {name: wrappers.pop(name) for name in (within, key) if name in wrappers}
    model.wrappers[kind] = {**outer, **wrappers}


def noise_latent(model: ModelPatcher, trajectory: Trajectory) -> Tensor:
    """[b, c, h, w] where the trajectory starts, as the latent that a sampler without added noise begins at."""
    return model.model.process_latent_out(trajectory.states[0])
