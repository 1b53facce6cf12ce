"""An answer moved in the image that it predicts and not in the noise: Asyrp's asymmetric step (arXiv 2210.10960).

Let D be the model's denoised estimate and D~ the one with h, the middle block's output, moved. Wanted is a step that
goes to D~ where it goes to D, and keeps what it keeps of x - D. Samplers see one estimate R, of which a step takes a
part: x' = kept x + taken R + noise. With R = D + (D~ - D) / taken it is x' = kept x + taken D + noise + (D~ - D), and
that is the step wanted, x' = D~ + kept (x - D) + noise, as kept and taken are 1 together.

It is the positive prompt's estimate that is moved. Guidance is linear in it, so that the guided one is moved in the
same way. D~ is asked for in a call of its own, so that edits give it all that they give D.
"""

from __future__ import annotations

from typing import Protocol

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider, Sampler
from torch import Tensor

from ..files.trajectory import ModelIdentity
from ..run.alone import alone
from ..run.model import add_outermost
from ..run.refusals import check_direction, check_every_call, check_follows, check_middle, check_middle_size
from ..run.schedule import step_of
from ..run.shortcuts import uncompiled
from ..unet.patches import with_middle
from .call import CHUNKS, place, slice_of
from .virtual import Mix, mix_of

KEY = "palimpsest.asymmetric"


class Moves(Protocol):
    """node: the display name of the node that made it. model: the one that it was made with."""

    node: str
    model: ModelIdentity

    def along(self, sigmas: Tensor) -> list[Tensor | None]:
        """[c, h, w] to add to h at each step of a run along falling sigmas [m + 1]; None where h stays as it is."""


class _Run:
    """What one sampling run moves h by, step by step: the sum where several say so."""

    def __init__(self, moves: tuple[Moves, ...], guider: CFGGuider, sigmas: Tensor, mix: Mix) -> None:
        self.guider, self.sigmas, self.mix = guider, sigmas, mix
        steps = zip(*(move.along(sigmas) for move in moves), strict=True)
        self.deltas = [sum(found) if (found := [d for d in step if d is not None]) else None for step in steps]

    def at(self, sigma: float) -> tuple[Tensor | None, float]:
        """What h is moved by, and how much of the model's answer the sampler takes."""
        step = step_of(self.sigmas, sigma)
        _, taken = self.mix(sigma, float(self.sigmas[step + 1]))
        return self.deltas[step], taken


def attach_moves(model: ModelPatcher, moves: Moves) -> ModelPatcher:
    """A clone of `model` whose h moves, beside what moves it already. Raises ValueError for models without an h, and
    for others than that of `moves`.
    """
    check_middle(model, moves.node)
    check_direction(model, moves.model, moves.node)
    model = model.clone()
    options = model.model_options["transformer_options"]
    if KEY not in options:
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
        add_outermost(model, WrappersMP.CALC_COND_BATCH, KEY, _calc_cond_batch)  # the source joins both calls
    options[KEY] = (*options.get(KEY, ()), moves)
    return model


def _outer_sample(executor, noise: Tensor, latent: Tensor, sampler: Sampler, sigmas: Tensor, *args, **kwargs):
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]  # the host's copy for this run alone
    moves, mix = options[KEY], mix_of(sampler, flow=False)
    check_every_call(guider.model_patcher, moves[0].node)
    check_follows(moves[0].node, sampler, mix is not None)
    options[KEY] = _Run(moves, guider, sigmas, mix)
    return executor(noise, latent, sampler, sigmas, *args, **kwargs)


def _calc_cond_batch(executor, model, conds: list, x: Tensor, timestep: Tensor, model_options: dict):
    options = model_options["transformer_options"]
    run = options.get(KEY)
    at = run and place(conds, run.guider.conds["positive"])
    results = executor(model, conds, x, timestep, model_options)
    if at is None:
        return results
    delta, taken = run.at(float(timestep[0]))
    if delta is None:
        return results

    def move(h: Tensor, options: dict) -> Tensor:
        check_middle_size(h, delta)
        chunks = options.get(CHUNKS, options["cond_or_uncond"])
        h = h.clone()
        for chunk in [i for i, index in enumerate(chunks) if index == at]:
            h[slice_of(h, chunks, chunk)] += delta.to(h)
        return h

    moved_options = {**model_options, "transformer_options": with_middle(uncompiled(options), move)}
    moved = executor(model, alone(conds, at), x, timestep, moved_options)[at]
    results[at] = results[at] + (moved - results[at]) / taken
    return results
