"""Null-text inversion (arXiv 2211.09794, section 3.3 and algorithm 1): negatives that make guided sampling reconstruct.

Sampling starts at the noise of a DDIM inversion at guidance 1, whose states z*_t are the pivot, and goes down at the
guidance of the edit. At each step Adam fits the negative's embedding, nothing else, to min ||z*_{t-1} - z_{t-1}||^2.
The next step begins with the negative that this one found, at the z_{t-1} that it led to. Begun with the source prompt
in place of the empty one, the first guess is negative-prompt inversion (arXiv 2305.16807).

The host's sampler space is x = z sqrt(1 + sigma^2), where a DDIM step is an Euler step in sigma; losses are those of z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from comfy.conds import CONDCrossAttn
from comfy.model_patcher import ModelPatcher
from comfy.samplers import sampler_object
from comfy.utils import repeat_to_batch_size
from torch import Tensor

from ..host.branch.call import NEGATIVE, POSITIVE, estimate
from ..host.files.conditioning import copied
from ..host.files.trajectory import EULER, Trajectory
from ..host.files.unfinished import Unfinished
from ..host.run.model import noise_latent
from ..host.run.refusals import (
    check_attention,
    check_every_call,
    check_one_gpu,
    check_plain,
    check_same_model,
    check_source,
    check_unet,
    check_unguided,
    check_without_values,
)
from ..host.run.sampler import OwnSampler, Run
from ..host.run.timed import timed
from ..host.unet.gradients import constant_control, differentiable, gradients, refusing
from .run import Guidance, asked_twice, check_unedited, record, sample

NODE = "Null Text Inversion"
MOST_STEPS = 100  # where the paper's learning rate ends
# By how much a plain step may miss the pivot, as root mean square of z. From 10 steps up, DDIM inversions at cfg 1 miss
# it by 0.1 at most (at cfg 3 by hardly more, so these pass), independent noises by 0.8 at least.
MISS = 0.5
FEWEST_STEPS = 10  # below, steps are coarse and sound inversions miss it too


class Settings(NamedTuple):
    """The paper's, with its numbers as defaults."""

    cfg: float = 7.5
    inner_steps: int = 10
    learning_rate: float = 0.01
    early_stop: float = 1e-5

    def rate(self, step: int) -> float:
        return self.learning_rate * (1 - step / MOST_STEPS)

    def enough(self, step: int) -> float:
        """The loss below which a step is left as it is."""
        return self.early_stop + 2e-5 * step


def fit(
    embedding: Tensor,
    reach: Callable[[Tensor], tuple[Tensor, Tensor]],
    rate: float,
    enough: float,
    inner_steps: int,
) -> tuple[Tensor, Tensor]:
    """Adam on one step's embedding [b, tokens, channels]: what is found, and the x [b, c, h, w] that it reaches.

    `reach(embedding)` is the sampler's next x and the losses [b] there. Every image of the batch stops by itself,
    before an update that it does not need.
    """
    embedding = embedding.clone().requires_grad_()
    adam = torch.optim.Adam([embedding], rate)
    for _ in range(inner_steps):
        x, losses = reach(embedding)
        going_on = losses >= enough
        if not going_on.any():
            return embedding.detach(), x.detach()
        (embedding.grad,) = torch.autograd.grad(losses.sum(), embedding)
        before = embedding.detach().clone()
        adam.step()
        with torch.no_grad():
            embedding.copy_(torch.where(going_on[:, None, None], embedding, before))
    with torch.no_grad():
        return embedding.detach(), reach(embedding)[0]


def missed(x: Tensor, pivot: Tensor, sigma: float) -> Tensor:
    """[b]: mean squared error of z, which is x sqrt(alpha_bar)."""
    return ((x - pivot) * (1 + sigma**2) ** -0.5).square().flatten(1).mean(1)


class NullTextSampler(OwnSampler):
    """Goes down the pivot's sigmas and keeps the negative and the state of every step. Made anew for each run."""

    def __init__(self, pivot: Trajectory, start: Tensor, settings: Settings) -> None:
        self.pivot, self.start, self.settings = pivot, start, settings
        self.negatives: list[Tensor] = []
        self.states = [pivot.states[0]]

    def walk(self, run: Run) -> Tensor:
        unfinished = self._unfinished(run)
        if kept := unfinished.load():
            self.negatives, self.states = [*kept["negatives"]], [*kept["states"]]
        try:
            while len(self.negatives) < self.pivot.steps:
                with gradients(), refusing(NODE):
                    found = self._step(run)
                embedding, x = (tensor.to("cpu", torch.float32) for tensor in found)
                self.negatives.append(embedding)
                self.states.append(x)
        finally:  # an interrupt too keeps what is done
            if len(self.negatives) == self.pivot.steps:
                unfinished.remove()
            elif self.negatives:
                unfinished.save({"negatives": torch.stack(self.negatives), "states": torch.stack(self.states)})
        return self.states[-1].to(run.latent)

    def _step(self, run: Run) -> tuple[Tensor, Tensor]:
        i, settings = len(self.negatives), self.settings
        sigma, sigma_next = self.pivot.sigmas[i : i + 2].tolist()
        x, pivot = (states.to(run.latent, copy=True) for states in (self.states[i], self.pivot.states[i + 1]))
        positive, negative = (run.guider.conds[name][0] for name in ("positive", "negative"))
        negative = constant_control(negative)

        def denoise(at: int, cond: dict) -> Tensor:
            timestep = x.new_full((len(x),), sigma)
            return estimate(run.guider.inner_model, at, cond, x, timestep, run.model_options)

        with torch.no_grad():
            conditional = denoise(POSITIVE, positive)
        calls = 0

        def reach(embedding: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal calls
            unconditional = denoise(NEGATIVE, with_embedding(negative, embedding))
            denoised = unconditional + (conditional - unconditional) * settings.cfg
            each = settings.inner_steps + 1
            run.report(i * each + calls, denoised.detach(), x, self.pivot.steps * each)
            calls += 1
            reached = x + (x - denoised) / sigma * (sigma_next - sigma)
            if not torch.isfinite(reached).all():
                raise ValueError(
                    f"{NODE} came to NaN or infinite values in step {i + 1} of {self.pivot.steps}, with learning_rate "
                    f"{settings.learning_rate:g} and cfg {settings.cfg:g}: lower learning_rate, or cfg."
                )
            return reached, missed(reached, pivot, sigma_next)

        start = (self.negatives[-1] if self.negatives else self.start).to(run.latent, copy=True)
        return fit(start, reach, settings.rate(i), settings.enough(i), settings.inner_steps)

    def _unfinished(self, run: Run) -> Unfinished:
        """Known by the inputs, and by what the model, with all that patches it and its prompts, first answers."""
        x = self.states[0].to(run.latent, copy=True)
        with torch.no_grad():
            answer = asked_twice(run.denoise, NODE)(x, float(self.pivot.sigmas[0]))
        return Unfinished("null-text", self.settings, self.pivot.states, self.pivot.sigmas, self.start, answer)


def check(model: ModelPatcher, pivot: Trajectory, start: list, settings: Settings) -> None:
    """Raises ValueError for models, trajectories, prompts and settings that this does not fit."""
    check_optimised(NODE, "negatives", model, pivot, start)
    if settings.cfg == 1:
        raise ValueError(f"{NODE} at cfg 1 has nothing to optimise, as the negative is not used: set the edit's cfg.")


def check_optimised(node: str, fitted: str, model: ModelPatcher, pivot: Trajectory, negative: list) -> None:
    """Raises ValueError where `node` cannot fit what it does, its `fitted`, to a pivot by gradients through a model."""
    check_unedited(model, node)
    check_every_call(model, node)
    check_unguided(model)
    check_unet(model, node)
    check_one_gpu(model)
    check_attention(model, node)
    check_same_model(model, pivot)
    if pivot.sampler != EULER:
        raise ValueError(
            f"{node} fits its {fitted} to the steps of euler, but the trajectory was inverted for {pivot.sampler}: "
            "set solver of DDIM Inversion to ddim (euler)."
        )
    check_source(pivot.conditioning)
    check_without_values(pivot, node)
    ((source, options),) = pivot.conditioning
    check_plain(negative, f"The empty prompt of {node}", source)
    if options.get("gligen") is not None:
        raise ValueError(f"{node} cannot work through GLIGEN: invert with a source prompt that has none.")
    if pivot.steps > MOST_STEPS:
        raise ValueError(
            f"{node} follows the paper's learning rate, which ends at step {MOST_STEPS}, but the trajectory has "
            f"{pivot.steps} steps: invert with at most {MOST_STEPS}."
        )


def check_pivot(model: ModelPatcher, pivot: Trajectory, node: str = NODE) -> None:
    """Raises ValueError for trajectories that the sampler does not follow, such as those of independent noises.

    A plain step with the source prompt at cfg 1 is tried at the first state and at one in the middle. Steps from the
    noise are coarse, so one of the two may miss.
    """
    if pivot.steps < FEWEST_STEPS:
        return
    euler, guidance = sampler_object("euler"), Guidance(pivot.conditioning, None, 1.0)
    misses = []
    for i in (0, pivot.steps // 2):
        part = pivot._replace(states=pivot.states[i : i + 2], sigmas=pivot.sigmas[i : i + 2])
        start = noise_latent(model, part)
        reached, _ = record(model, guidance, euler, part.sigmas, torch.zeros_like(start), start, seed=0)
        misses.append(distances(reached, part)[:, 1])
    miss = float(torch.stack(misses).amin(0).max())
    if miss > MISS:
        raise ValueError(
            f"{node} was given a trajectory that sampling does not follow, not even at cfg 1 (a step misses it by "
            f"{miss:.2f}): connect the trajectory of DDIM Inversion at cfg 1, not that of Edit Friendly Inversion."
        )


def null_text(
    model: ModelPatcher, pivot: Trajectory, start: list, settings: Settings, checkpointing: bool
) -> tuple[list, Trajectory]:
    """The negatives, one a step, as a CONDITIONING that is begun with `start`'s; and the trajectory they lead along.

    Raises ValueError as `check`.
    """
    check(model, pivot, start, settings)
    ((embedding, options),), ((_, source),) = copied(start), pivot.conditioning
    if source.get("control_apply_to_uncond"):
        options = {"control": source["control"], **options}  # the host would give it to the first negative only
    embedding = repeat_to_batch_size(embedding.to("cpu", torch.float32), pivot.states.shape[1])
    guidance, sampler = Guidance(pivot.conditioning, start, settings.cfg), NullTextSampler(pivot, embedding, settings)
    working = differentiable(model, checkpointing)
    if working.model.get_dtype_inference() != torch.float32:
        working.set_model_compute_dtype(torch.float32)  # gradients of 1e-5 are lost in half precision
    nothing = torch.zeros(pivot.states.shape[1:])
    sample(working, guidance, sampler, pivot.sigmas, nothing, nothing, seed=0)
    percent_to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    negative = timed(torch.stack(sampler.negatives), options, pivot.sigmas, percent_to_sigma)
    return negative, pivot._replace(states=torch.stack(sampler.states))


def distances(trajectory: Trajectory, pivot: Trajectory) -> Tensor:
    """[b, n + 1]: root mean square of z - z* at every sigma."""
    signal = (1 + pivot.sigmas**2).rsqrt()[:, None]
    return ((trajectory.states - pivot.states).square().flatten(2).mean(2).sqrt() * signal).T


def with_embedding(cond: dict, embedding: Tensor) -> dict:
    """A processed conditioning with another embedding [1 or b, tokens, channels]."""
    return {**cond, "model_conds": {**cond["model_conds"], "c_crossattn": CONDCrossAttn(embedding)}}
