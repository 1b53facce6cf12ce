"""Facts about the host's MODEL."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_sampling as sampling
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .trajectory import ModelIdentity, Trajectory
from .weights import sampled_weights


def prediction_type(model: ModelPatcher) -> str:
    """ "eps" or "v". Raises ValueError for models that predict anything else."""
    model_sampling = model.get_model_object("model_sampling")
    other = (sampling.CONST, sampling.EDM, sampling.X0)
    if isinstance(model_sampling, other) or not isinstance(model_sampling, sampling.EPS):
        kind = type(model.model).__name__
        raise ValueError(
            f"This MODEL ({kind}) predicts neither noise (eps) nor v, so no inversion here fits it: "
            "load an SD1.x, SD2.x or SDXL checkpoint, and remove nodes that change its sampling."
        )
    return "v" if isinstance(model_sampling, sampling.V_PREDICTION) else "eps"


def sampling_of(model: ModelPatcher) -> str:
    """What a sampler sees of the model: its prediction, and the timesteps of its noise levels."""
    prediction, model_sampling = prediction_type(model), model.get_model_object("model_sampling")
    middle = float(model_sampling.timestep(torch.ones(1)))
    return (
        f"{prediction}, sigma {model_sampling.sigma_min:.4g} to {model_sampling.sigma_max:.4g}, "
        f"timestep {middle:.4g} at sigma 1"
    )


def identity(model: ModelPatcher) -> ModelIdentity:
    """What a trajectory remembers of the model that made it."""
    return ModelIdentity(type(model.model).__name__, sampling_of(model), *sampled_weights(model))


def add_outermost(model: ModelPatcher, kind: str, key: str, wrapper: Callable, within: str | None = None) -> None:
    """Adds a wrapper around all others of its kind that are on the model but `within`'s, whichever node came first."""
    model.add_wrapper_with_key(kind, key, wrapper)
    wrappers = model.wrappers[kind]
    outer = {name: wrappers.pop(name) for name in (within, key) if name in wrappers}
    model.wrappers[kind] = {**outer, **wrappers}


def noise_latent(model: ModelPatcher, trajectory: Trajectory) -> Tensor:
    """[b, c, h, w] where the trajectory starts, as the latent that a sampler without added noise begins at."""
    return model.model.process_latent_out(trajectory.states[0])
