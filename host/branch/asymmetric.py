"""An answer moved in the image that it predicts and not in the noise: Asyrp's asymmetric step (arXiv 2210.10960).

Let D be the model's denoised estimate and D~ the one with h, features of its decoder, moved. Wanted is a step that goes
to D~ where it goes to D, and keeps what it keeps of x - D. Samplers see one estimate R, of which a step takes a part:
x' = kept x + taken R + noise. With R = D + (D~ - D) / taken it is x' = kept x + taken D + noise + (D~ - D), and that is
the step wanted, x' = D~ + kept (x - D) + noise, as kept and taken are 1 together.

It is the positive prompt's estimate that is moved. Guidance is linear in it, so that the guided one is moved in the
same way. D~ is asked for in a call of its own, so that edits give it all that they give D.

In its last steps the paper adds noise, as DDPM does, for quality: down from sigma s to t the step keeps (t / s)^2 of
x - D, and noise makes up for what is lost of its variance. The guided D becomes R likewise, with the noise in it.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider, Sampler
from torch import Tensor

from ..files.trajectory import ModelIdentity
from ..run.alone import alone
from ..run.model import add_outermost
from ..run.refusals import (
    OURS,
    check_boost,
    check_boosted,
    check_decoder,
    check_direction,
    check_every_call,
    check_follows,
    check_h_size,
)
from ..run.schedule import fraction_of, step_of
from ..run.shortcuts import uncompiled
from ..unet.patches import with_decoded
from . import virtual
from .call import CHUNKS, place, slice_of
from .virtual import Mix, mix_of

KEY = f"{OURS}Apply H Space Direction"


class Moves(Protocol):
    """node: the display name of the node that made it. model: the one that it was made with.

    block: the output block before which h stands, 0 for the middle block's output. end: of the run, 0 to 1, until where
    h is moved at most. boost: from where on noise is added, 1 for never.
    """

    node: str
    model: ModelIdentity
    block: int
    end: float
    boost: float

    def along(self, sigmas: Tensor) -> list[Tensor | None]:
        """[c, h, w] to add to h at each step of a run along falling sigmas [m + 1]; None where h stays as it is."""


class _Run:
    """What one sampling run moves h by, step by step and block by block: the sum where several say so."""

    def __init__(self, moves: tuple[Moves, ...], guider: CFGGuider, sigmas: Tensor, mix: Mix, seed: int) -> None:
        self.guider, self.sigmas, self.mix = guider, sigmas, mix
        self.deltas: list[dict[int, Tensor]] = [{} for _ in sigmas[1:]]
        for move in moves:
            for deltas, delta in zip(self.deltas, move.along(sigmas), strict=True):
                if delta is not None:
                    deltas[move.block] = deltas.get(move.block, 0) + delta
        self.boost = min(move.boost for move in moves)
        # The run and its sampler draw by seed and seed + 1.
        self.generator = torch.Generator().manual_seed((seed + 2) % 2**64)

    def deltas_at(self, sigma: float) -> dict[int, Tensor]:
        return self.deltas[step_of(self.sigmas, sigma)]

    def mixed_at(self, sigma: float) -> tuple[float, float]:
        """How much of the latent the sampler's step keeps, and how much of the model's answer it takes."""
        return self.mix(sigma, self.below(sigma))

    def below(self, sigma: float) -> float:
        return float(self.sigmas[step_of(self.sigmas, sigma) + 1])

    def boosted(self, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
        """The answer by which the sampler's step is DDPM's, or its own where that adds as much noise itself."""
        if fraction_of(self.sigmas, sigma) < self.boost:
            return denoised
        kept, taken = self.mixed_at(sigma)
        wanted = min(kept, (self.below(sigma) / sigma) ** 2)
        noise = torch.randn(x.shape, generator=self.generator).to(x)
        added = sigma * (kept**2 - wanted**2) ** 0.5 * noise
        return denoised + ((wanted - kept) * (x - denoised) + added) / taken


def attach_moves(model: ModelPatcher, moves: Moves) -> ModelPatcher:
    """A clone of `model` whose h moves, beside what moves it already. Raises ValueError for models without an h, and
    for others than that of `moves`, and for noise that is to come in before all moves are over.
    """
    check_decoder(model, moves.block, moves.node)
    check_direction(model, moves.model, moves.node)
    model = model.clone()
    options = model.model_options["transformer_options"]
    if KEY not in options:
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
        add_outermost(model, WrappersMP.CALC_COND_BATCH, KEY, _calc_cond_batch)  # the source joins both calls
        add_outermost(model, WrappersMP.PREDICT_NOISE, KEY, _predict_noise)
    options[KEY] = (*options.get(KEY, ()), moves)
    check_boost(moves.node, max(each.end for each in options[KEY]), min(each.boost for each in options[KEY]))
    return model


def _outer_sample(
    executor, noise: Tensor, latent: Tensor, sampler: Sampler, sigmas: Tensor, mask, callback, quiet, seed, **kwargs
):
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]  # the host's copy for this run alone
    moves, mix = options[KEY], mix_of(sampler, flow=False)
    check_every_call(guider.model_patcher, moves[0].node)
    check_follows(moves[0].node, sampler, mix is not None)
    run = options[KEY] = _Run(moves, guider, sigmas, mix, seed or 0)
    if run.boost < 1:
        check_boosted(moves[0].node, virtual.KEY in options)
    return executor(noise, latent, sampler, sigmas, mask, callback, quiet, seed, **kwargs)


def _predict_noise(executor, x: Tensor, timestep: Tensor, model_options: dict, *args, **kwargs) -> Tensor:
    denoised = executor(x, timestep, model_options, *args, **kwargs)  # other wrappers may move x itself
    return model_options["transformer_options"][KEY].boosted(x, denoised, float(timestep[0]))


def _calc_cond_batch(executor, model, conds: list, x: Tensor, timestep: Tensor, model_options: dict):
    options = model_options["transformer_options"]
    run = options[KEY]
    at = place(conds, run.guider.conds["positive"])
    results = executor(model, conds, x, timestep, model_options)
    if at is None:
        return results
    deltas = run.deltas_at(float(timestep[0]))
    if not deltas:
        return results

    def move(delta: Tensor, h: Tensor, options: dict) -> Tensor:
        check_h_size(h, delta)
        chunks = options.get(CHUNKS, options["cond_or_uncond"])
        h = h.clone()
        for chunk in [i for i, index in enumerate(chunks) if index == at]:
            h[slice_of(h, chunks, chunk)] += delta.to(h)
        return h

    options = uncompiled(options)
    for block, delta in deltas.items():
        options = with_decoded(options, block, partial(move, delta))
    moved = executor(model, alone(conds, at), x, timestep, {**model_options, "transformer_options": options})[at]
    _, taken = run.mixed_at(float(timestep[0]))
    results[at] = results[at] + (moved - results[at]) / taken
    return results
