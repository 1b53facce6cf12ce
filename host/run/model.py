"""Facts about the host's MODEL."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_sampling as sampling
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.supported_models import FluxSchnell
from torch import Tensor

from ..dit import architectures
from ..files.trajectory import ModelIdentity, Trajectory
from ..unet import tree
from .weights import sampled_weights

FLOW = "flow"
FEW = 15  # steps, as many as InfEdit runs on a distilled checkpoint


def prediction_type(model: ModelPatcher) -> str:
    """ "eps", "v" or "flow". Raises ValueError for models that predict anything else."""
    model_sampling = model.get_model_object("model_sampling")
    if isinstance(model_sampling, sampling.CONST) and not isinstance(model_sampling, sampling.IMG_TO_IMG_FLOW):
        return FLOW
    other = (sampling.CONST, sampling.EDM, sampling.X0)
    if isinstance(model_sampling, other) or not isinstance(model_sampling, sampling.EPS):
        kind = type(model.model).__name__
        raise ValueError(
            f"This MODEL ({kind}) predicts neither noise (eps), v nor a flow, so no inversion here fits it: "
            "load an SD1.x, SD2.x, SDXL, Flux or other flow checkpoint, and remove nodes that change its sampling."
        )
    return "v" if isinstance(model_sampling, sampling.V_PREDICTION) else "eps"


def told_many_steps(model: ModelPatcher, steps: int) -> str | None:
    """What to say where a model whose sampling is that of a distilled checkpoint is to run many steps.

    A checkpoint or LoRA without ModelSamplingDiscrete's "lcm" looks like any other.
    """
    known = getattr(model.get_model_object("model_sampling"), "original_timesteps", None)  # ModelSamplingDiscrete's own
    if known is None or steps <= FEW:
        return None
    return (
        f"This MODEL's sampling, lcm of ModelSamplingDiscrete, is for checkpoints distilled to a few of {known} "
        f"timesteps, but {steps} steps were run: run 4 to {FEW}, or take the MODEL from before that node."
    )


def is_unet(model: ModelPatcher) -> bool:
    return isinstance(model.model.diffusion_model, UNetModel)


def is_flow(model: ModelPatcher) -> bool:
    """Whether x at sigma is (1 - sigma) image + sigma noise. Raises ValueError as `prediction_type`."""
    return prediction_type(model) == FLOW


def prompt_width(model: ModelPatcher) -> int | None:
    """Channels of the embeddings that its prompts have; None where that is not known."""
    network = model.model.diffusion_model
    return tree.prompt_width(network) if isinstance(network, UNetModel) else architectures.prompt_width(network)


def told_distilled(model: ModelPatcher) -> str | None:
    """What to say of an inversion by a model whose kind is distilled to few steps, None of any other.

    That of a checkpoint which was trained back to many steps cannot be told from its kind.
    """
    if not isinstance(model.model.model_config, FluxSchnell):
        return None
    return (
        "This MODEL is of FLUX.1 schnell's kind: where its checkpoint is distilled to a few steps, the image is "
        "inverted badly and comes back as another; edit it by Flow Edit instead."
    )


def check_noise_predicted(model: ModelPatcher, node: str) -> None:
    """Raises ValueError for models that predict a flow, where `node` knows noise alone."""
    if is_flow(model):
        raise ValueError(
            f"{node} is for models that predict noise or v, as SD1.x, SD2.x and SDXL do, but this MODEL "
            f"({type(model.model).__name__}) predicts a flow: use Flow Edit, Virtual Inversion or DDIM Inversion."
        )


def fitting(model: ModelPatcher, samples: Tensor) -> Tensor:
    """Image latents [b, c, h, w] with the time that the model's have, as the host's samplers make them."""
    dimensions = model.get_model_object("latent_format").latent_dimensions
    return samples.unsqueeze(2) if dimensions == 3 and samples.ndim == 4 else samples


def noised(model: ModelPatcher, image: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The latent at `sigma` of an image [b, c, (t,) h, w] under `noise`, all in sampler space."""
    sigmas = torch.full((len(noise),), sigma).to(noise)
    return model.get_model_object("model_sampling").noise_scaling(sigmas, noise.clone(), image)


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


def noise_latent(model: ModelPatcher, trajectory: Trajectory, index: int = 0) -> Tensor:
    """[b, c, (t,) h, w]: a state of the trajectory, the first unless told, as a sampler without added noise takes it.

    At a flow's sigma 1 there is none, as a sampler multiplies its latent by 0: the state itself, for `start_of`.
    """
    state, sigma = trajectory.states[index], trajectory.sigmas[index : index + 1]
    if is_flow(model) and sigma < 1:
        state = model.get_model_object("model_sampling").inverse_noise_scaling(sigma, state)
    return model.model.process_latent_out(state)


def start_of(model: ModelPatcher, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """Noise and latent [b, c, (t,) h, w] by which the host's samplers begin at the trajectory's first state."""
    if not is_flow(model):
        samples = noise_latent(model, trajectory)
        return torch.zeros_like(samples), samples
    scale = float(trajectory.sigmas[0]) * getattr(model.get_model_object("model_sampling"), "noise_scale", 1.0)
    return trajectory.states[0] / scale, torch.zeros_like(trajectory.states[0])
