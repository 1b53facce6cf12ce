"""An image as a trajectory without a run of the network: the image itself, with noise on it at every sigma.

Edits without inversion go from there (`host.branch.virtual`), each method by one of the host's samplers:

InfEdit (arXiv 2312.04965), section 3, "virtual inversion": `lcm`, noise drawn anew for each step.
FlowEdit (arXiv 2412.08629), algorithm 1: `euler`; noise drawn anew for each step, or the same throughout.
Edit-friendly DDPM (arXiv 2304.06140) and TurboEdit (arXiv 2408.00735): `euler_ancestral`. Their noise maps are those of
the source's own walk, and what they add to the target's is this difference.
"""

from __future__ import annotations

from typing import NamedTuple

import comfy.sample
import comfy.samplers
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..host.branch.virtual import Path, Virtual, attach_virtual
from ..host.files.trajectory import Trajectory
from ..host.run.model import fitting, noised
from ..host.run.refusals import check_every_call, check_latent
from .run import Guidance, as_trajectory, check_unedited

NODE = "Virtual Inversion"


class Method(NamedTuple):
    """sampler: its name in the host. fresh: whether each step has noise of its own, in place of the sampler's."""

    sampler: str
    fresh: bool = False


PRESETS = {
    "FlowEdit": Method("euler", fresh=True),
    "FlowEdit, one noise (DDIM)": Method("euler"),
    "InfEdit": Method("lcm"),
    "edit-friendly": Method("euler_ancestral"),
}


def schedule(model: ModelPatcher, scheduler: str, steps: int, strength: float) -> Tensor:
    """[steps + 1] falling sigmas: those of KSampler, `strength` being its denoise. Raises ValueError where it is 0."""
    if strength == 0:
        raise ValueError(f"{NODE} starts at the end of its schedule at strength 0: raise strength.")
    sampling = model.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, scheduler, int(steps / strength))[-steps - 1 :]


def invert_virtually(
    model: ModelPatcher,
    source: list,
    samples: Tensor,
    sigmas: Tensor,
    fresh: bool = False,
    mask: Tensor | None = None,
    seed: int = 0,
) -> tuple[ModelPatcher, Trajectory]:
    """A MODEL whose samples are edits of image latents [b, c, (t,) h, w], and the image with its noise at `sigmas`.

    source: the prompt that says what the image shows. mask: where to edit, as the host's noise mask. Raises ValueError
    for models and latents that cannot be edited.
    """
    check_unedited(model, NODE)
    samples = fitting(model, samples)
    check_every_call(model, NODE)
    check_latent(model, samples)
    image = model.model.process_latent_in(samples)
    noise = comfy.sample.prepare_noise(samples, seed)
    states = [noised(model, image, noise, sigma) for sigma in sigmas.tolist()]
    trajectory = as_trajectory(model, Guidance(source), states, sigmas, seed)
    path = Path.FRESH if fresh else Path.SAMPLED
    virtual = Virtual(NODE, samples.clone(), None if mask is None else mask.clone(), path)
    return attach_virtual(model, trajectory, virtual), trajectory
