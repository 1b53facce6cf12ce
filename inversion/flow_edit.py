"""FlowEdit (arXiv 2412.08629): the target moves by the difference of two velocities, each at a state of its own.

Algorithm 1 in the host's terms is `host.branch.virtual`: z_edit is the image plus d, z_src the image under noise, z_tar
their sum less the image, and the velocities' difference (d - Delta) / sigma. Where a trajectory gives z_src in place of
fresh noise, the same formula samples the target with what the source's own steps lack added to its.

FlowAlign (arXiv 2505.23145) is FlowEdit with the source's prompt as the target's negative, and `pull` zeta > 0: each
step gives back zeta of the difference of the two denoised estimates.
"""

from __future__ import annotations

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..host.branch.virtual import Path, Region, Virtual, attach_virtual
from ..host.files.conditioning import SEED, copied
from ..host.files.trajectory import Trajectory
from ..host.run.model import fitting, noised
from ..host.run.refusals import check_every_call, check_latent
from .run import Guidance, as_trajectory, check_unedited

NODE = "Flow Edit"


def edit_image(
    model: ModelPatcher,
    source: list,
    samples: Tensor,
    fresh: bool = True,
    cfg: float = 1.0,
    pull: float = 0.0,
    mask: Tensor | None = None,
    region: Region | None = None,
) -> ModelPatcher:
    """A MODEL that any run of the host's samplers from image latents [b, c, (t,) h, w] edits them with.

    source: the prompt that says what the image shows. fresh: whether each step draws noise of its own, as in the paper,
    or all have the sampler's. cfg: the source's guidance, by the sampler's negative prompt. pull: FlowAlign's zeta.
    mask: where to edit, as the host's noise mask. region: finds where to edit, in the run's own first steps. Raises
    ValueError for models and latents that cannot be edited.
    """
    check_unedited(model, NODE)
    check_every_call(model, NODE)
    samples = fitting(model, samples)
    check_latent(model, samples)
    image = model.model.process_latent_in(samples)
    sigmas = torch.tensor([float(model.get_model_object("model_sampling").sigma_max), 0.0])
    noise = comfy.sample.prepare_noise(samples, 0)
    states = [noised(model, image, noise, sigma) for sigma in sigmas.tolist()]
    trajectory = as_trajectory(model, Guidance(source), states, sigmas)
    path = Path.FRESH if fresh else Path.SAMPLED
    kept = Virtual(NODE, samples.clone(), None if mask is None else mask.clone(), path, cfg, pull, region)
    return attach_virtual(model, trajectory, kept)


def edit_trajectory(
    model: ModelPatcher,
    trajectory: Trajectory,
    source: list | None = None,
    cfg: float = 1.0,
    pull: float = 0.0,
    region: Region | None = None,
) -> ModelPatcher:
    """As `edit_image`, for runs along a trajectory, which has the source at every sigma.

    source: the prompt of the source's prediction, the trajectory's own where it is None. Raises ValueError where the
    trajectory is another model's.
    """
    check_unedited(model, NODE)
    check_every_call(model, NODE)
    if source is not None:
        seed = trajectory.conditioning[0][1][SEED]
        trajectory = trajectory._replace(conditioning=[[t, o | {SEED: seed}] for t, o in copied(source)])
    samples = model.model.process_latent_out(trajectory.states[-1])
    return attach_virtual(model, trajectory, Virtual(NODE, samples, None, Path.FOLLOWED, cfg, pull, region))
