"""StyleDiffusion (arXiv 2303.15649): values of the source's cross-attention by which guided sampling reconstructs.

Keys stay the source prompt's, so the words look where they looked; what they show is fitted to the image. At each step,
from the pivot's noise down at the guidance of the edit, Adam fits what goes into the value projections in place of the
prompt's embedding, to min L_rec + weight L_att: the squared error of z_{t-1} against the pivot's, and that of the
cross-attention maps in the layers of one size, of 16 x 16 positions, against those of the source prompt at the pivot's
z_t. Means are over elements; L_att is a sum over layers. Numbers are those of the public code.

The paper fits a network per step that maps CLIP's features of the image to this embedding. Here the embedding itself is
fitted, begun with the prompt's; each step begins where the one before it ended, as in null-text inversion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from comfy.model_patcher import ModelPatcher
from comfy.utils import repeat_to_batch_size
from torch import Tensor

from ..host.branch.call import NEGATIVE, POSITIVE, estimate, slice_of, with_value
from ..host.branch.maps import attention_maps
from ..host.files.trajectory import VALUES, Trajectory
from ..host.files.unfinished import Unfinished
from ..host.layer import Inputs, Layer
from ..host.run.model import noise_latent
from ..host.run.refusals import check_positions_kept, check_prompt_kept
from ..host.run.sampler import OwnSampler, Run
from ..host.run.shortcuts import uncompiled
from ..host.unet.gradients import constant_control, differentiable, gradients, isolated, refusing
from ..host.unet.patches import layer_of, with_enter, with_measure
from .null_text import MOST_STEPS, check_optimised, fit, missed
from .run import Guidance, asked_twice, sample

NODE = "Value Inversion"
Take = Callable[[Tensor, Layer], None]


class Settings(NamedTuple):
    """Those of the public code as defaults.

    inner_steps: updates of the first step. map_weight: of L_att. map_side: positions a side of the layers it compares.
    """

    cfg: float = 7.5
    inner_steps: int = 100
    learning_rate: float = 0.01
    early_stop: float = 1e-5
    map_weight: float = 1.0
    map_side: int = 16

    def updates(self, step: int) -> int:
        """At most so many: most of them at the first steps."""
        return math.ceil(self.inner_steps * math.exp(-0.1 * step))

    def rate(self, step: int) -> float:
        return self.learning_rate * (1 - step / MOST_STEPS)

    def enough(self, step: int) -> float:
        """The loss below which a step is left as it is."""
        return self.early_stop + 2e-5 * step


class ValueSampler(OwnSampler):
    """Goes down the pivot's sigmas and keeps the values and the state of every step. Made anew for each run."""

    def __init__(self, pivot: Trajectory, noise: Tensor, start: Tensor, settings: Settings) -> None:
        self.pivot, self.start, self.settings = pivot, start, settings
        self.values: list[Tensor] = []
        self.states = [noise]

    def walk(self, run: Run) -> Tensor:
        unfinished = self._unfinished(run)
        if kept := unfinished.load():
            self.values, self.states = [*kept["values"]], [*kept["states"]]
        try:
            while len(self.values) < self.pivot.steps:
                with gradients(), refusing(NODE):
                    embedding = self._step(run)
                x = self._next(run, embedding)
                self.values.append(embedding.to("cpu", torch.float32))
                self.states.append(x.to("cpu", torch.float32))
        finally:  # an interrupt too keeps what is done
            if len(self.values) == self.pivot.steps:
                unfinished.remove()
            elif self.values:
                unfinished.save({"values": torch.stack(self.values), "states": torch.stack(self.states)})
        return self.states[-1].to(run.latent)

    def _step(self, run: Run) -> Tensor:
        i, settings = len(self.values), self.settings
        sigma, sigma_next = self.pivot.sigmas[i : i + 2].tolist()
        x, pivot, before = (
            state.to(run.latent, copy=True)
            for state in (self.states[i], self.pivot.states[i + 1], self.pivot.states[i])
        )
        positive, negative = (run.guider.conds[name][0] for name in ("positive", "negative"))
        positive = constant_control(positive)
        timestep = x.new_full((len(x),), sigma)
        reference: dict[Layer, Tensor] = {}
        losses: dict[Layer, Tensor] = {}  # by layer: a checkpointed one is measured again for its gradient

        def see(maps: Tensor, layer: Layer) -> None:
            reference[layer] = maps

        def compare(maps: Tensor, layer: Layer) -> None:
            losses[layer] = (maps - reference[layer]).square().flatten(1).mean(1)

        with torch.no_grad():
            unconditional = estimate(run.guider.inner_model, NEGATIVE, negative, x, timestep, run.model_options)
            if settings.map_weight:
                options = self._options(run, None, see)
                estimate(run.guider.inner_model, POSITIVE, positive, before, timestep, options)
                self._check_maps(reference, run.latent)
        calls = 0

        def reach(embedding: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal calls
            options = self._options(run, embedding, compare if settings.map_weight else None)
            conditional = estimate(run.guider.inner_model, POSITIVE, positive, x, timestep, options)
            denoised = unconditional + (conditional - unconditional) * settings.cfg
            self._report(run, i, calls, denoised.detach(), x)
            calls += 1
            reached = x + (x - denoised) / sigma * (sigma_next - sigma)
            if not torch.isfinite(reached).all():
                raise ValueError(
                    f"{NODE} came to NaN or infinite values in step {i + 1} of {self.pivot.steps}, with learning_rate "
                    f"{settings.learning_rate:g} and cfg {settings.cfg:g}: lower learning_rate, or cfg."
                )
            loss = missed(reached, pivot, sigma_next)
            return reached, loss + settings.map_weight * sum(losses.values())

        start = (self.values[-1] if self.values else self.start).to(run.latent, copy=True)
        embedding, _ = fit(start, reach, settings.rate(i), settings.enough(i), settings.updates(i))
        return embedding

    def _next(self, run: Run, embedding: Tensor) -> Tensor:
        """The host's own guided Euler step, with these values in the prompt's rows."""
        i = len(self.values)
        sigma, sigma_next = self.pivot.sigmas[i : i + 2].to(run.latent)
        x = self.states[i].to(run.latent, copy=True)
        denoised = run.denoise(x, float(sigma), model_options=self._options(run, embedding, None))
        self._report(run, i, self.settings.updates(i) + 1, denoised, x)
        return x + (x - denoised) / sigma * (sigma_next - sigma)

    def _report(self, run: Run, step: int, done: int, denoised: Tensor, x: Tensor) -> None:
        each = [self.settings.updates(i) + 2 for i in range(self.pivot.steps)]
        run.report(sum(each[:step]) + done, denoised, x, sum(each))

    def _options(self, run: Run, values: Tensor | None, take: Take | None) -> dict:
        """The options of a model call with `values` in the positive prompt's rows, and `take` shown its maps."""
        options = uncompiled(isolated(run.model_options["transformer_options"]))
        if values is not None:

            def enter(kind: str, rows: Inputs, extra_options: dict) -> Inputs:
                chunks = extra_options["cond_or_uncond"]
                if kind == "self" or POSITIVE not in chunks:
                    return rows
                return with_value(rows, slice_of(rows.value, chunks, chunks.index(POSITIVE)), values)

            options = with_enter(options, enter)
        if take is not None:
            options = with_measure(options, self._measure(take), run.guider.inner_model.diffusion_model)
        return {**run.model_options, "transformer_options": options}

    def _measure(self, take: Take) -> Callable[[Tensor, Tensor, dict], None]:
        tokens = self.start.shape[1]

        def measure(query: Tensor, key: Tensor, extra_options: dict) -> None:
            layer = layer_of("cross", extra_options)
            if max(layer.height, layer.width) == self.settings.map_side:
                check_positions_kept(query.shape[1], layer.positions)
                check_prompt_kept(key.shape[1], tokens)
                take(attention_maps(query, key, extra_options["n_heads"], tokens), layer)

        return measure

    def _check_maps(self, reference: dict[Layer, Tensor], latent: Tensor) -> None:
        if not reference:
            height, width = latent.shape[-2:]
            raise ValueError(
                f"{NODE} finds no cross-attention layer of {self.settings.map_side} positions a side in this MODEL at "
                f"latents of {width} x {height}: set map_side to {max(height, width)} or a half, quarter or eighth of "
                "it, or map_weight to 0."
            )

    def _unfinished(self, run: Run) -> Unfinished:
        """Known by the inputs, and by what the model, with all that patches it and its prompts, first answers."""
        x = self.states[0].to(run.latent, copy=True)
        with torch.no_grad():
            answer = asked_twice(run.denoise, NODE)(x, float(self.pivot.sigmas[0]))
        return Unfinished("values", self.settings, self.pivot.states, self.pivot.sigmas, self.start, answer)


def check(model: ModelPatcher, pivot: Trajectory, negative: list) -> None:
    """Raises ValueError for models, trajectories and prompts that this does not fit."""
    check_optimised(NODE, "values", model, pivot, negative)


def value_inversion(
    model: ModelPatcher, pivot: Trajectory, negative: list, settings: Settings, checkpointing: bool
) -> Trajectory:
    """The path that guided sampling takes with the values found, which it carries. Raises ValueError as `check`."""
    check(model, pivot, negative)
    ((embedding, options),) = pivot.conditioning
    start = repeat_to_batch_size(embedding.to("cpu", torch.float32), pivot.states.shape[1])
    noise = model.model.process_latent_in(noise_latent(model, pivot))  # where the host's samplers begin, to the bit
    sampler = ValueSampler(pivot, noise, start, settings)
    working = differentiable(model, checkpointing)
    if working.model.get_dtype_inference() != torch.float32:
        working.set_model_compute_dtype(torch.float32)  # gradients of 1e-5 are lost in half precision
    nothing = torch.zeros(pivot.states.shape[1:])
    guidance = Guidance(pivot.conditioning, negative, settings.cfg)
    sample(working, guidance, sampler, pivot.sigmas, nothing, nothing, seed=0)
    conditioning = [[embedding, {**options, VALUES: torch.stack(sampler.values)}]]
    return pivot._replace(states=torch.stack(sampler.states), conditioning=conditioning)
