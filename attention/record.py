"""Recording an attention store: one row a step along a trajectory."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider
from torch import Tensor

from ..host.branch.maps import token_maps
from ..host.branch.source import KEY
from ..host.files.store import AttentionStore
from ..host.files.trajectory import Trajectory
from ..host.layer import Block, Inputs, Layer
from ..host.run.refusals import (
    check_every_call,
    check_one_size,
    check_positions_kept,
    check_prompt_kept,
    check_same_model,
    check_source,
    check_unet,
    check_unguided,
)
from ..host.run.sampler import OwnSampler, Run
from ..host.run.shortcuts import uncompiled
from ..host.unet.patches import layer_of, with_enter, with_measure
from ..host.unet.tree import residual_hooks
from .p2p import NEVER, Window

MAP_POSITIONS = 32**2  # greatest h * w of the layers whose word maps are kept


@dataclass(frozen=True)
class Recording:
    """What to record: as the edits' schedules. budget: bytes that the inputs may hold.

    features: the blocks whose residual features are kept, for the window of that name.
    """

    cross: Window
    self_: Window
    self_positions: int
    budget: int
    dtype: torch.dtype
    device: torch.device
    feature: Window = NEVER
    features: tuple[Block, ...] = ()

    def wants(self, layer: Layer, fraction: float) -> bool:
        if layer.kind == "cross":
            return fraction in self.cross
        if layer.kind == "feature":
            return fraction in self.feature
        return fraction in self.self_ and layer.positions <= self.self_positions

    def steps_within_budget(self, sizes: dict[Layer, int], steps: int) -> list[int]:
        """The steps to record, given the elements of each layer's input.

        A step saves the source's row only where it is recorded whole, and all save the same: the cheapest come first.
        """
        costs = []
        for step in range(steps):
            elements = sum(size for layer, size in sizes.items() if self.wants(layer, step / steps))
            if elements:
                costs.append((elements * self.dtype.itemsize, step))
        kept, held = [], 0
        for cost, step in sorted(costs):
            held += cost
            if held <= self.budget:
                kept.append(step)
        return sorted(kept)


def record_attention(model: ModelPatcher, trajectory: Trajectory, recording: Recording) -> AttentionStore:
    """Runs `model` once at every state of `trajectory` and keeps what edits read there, as far as the budget goes.

    Raises ValueError where the model is edited already, or the trajectory is another model's.
    """
    check_unet(model, "Record Attention")
    check_same_model(model, trajectory)
    check_source(trajectory.conditioning)
    check_every_call(model, "Record Attention")
    if KEY in model.model_options["transformer_options"]:
        raise ValueError("Record Attention was given a MODEL that is already edited: connect the MODEL from before.")
    check_unguided(model)
    walk = _Walk(trajectory, recording)
    guider = CFGGuider(walk.tapped(model))
    guider.inner_set_conds({"positive": trajectory.conditioning})
    guider.set_cfg(1.0)
    callback = latent_preview.prepare_callback(model, trajectory.steps)
    start, quiet = trajectory.states[0], not comfy.utils.PROGRESS_BAR_ENABLED
    guider.sample(torch.zeros_like(start), start, walk, trajectory.sigmas.clone(), None, callback, quiet, 0)
    return walk.store()


class _Walk(OwnSampler):
    """Visits the states of a trajectory, and keeps what flows past the attention layers. Made anew for each run."""

    def __init__(self, trajectory: Trajectory, recording: Recording) -> None:
        self.trajectory, self.recording = trajectory, recording
        self.steps: list[int] | None = None  # those within the budget, once the layers are known
        self.now = 0
        self.sizes: dict[Layer, int] = {}
        self.inputs: dict[tuple[int, Layer], Tensor] = {}
        self.maps: list[dict[tuple[int, int], list[Tensor]]] = [{} for _ in range(trajectory.steps)]

    def tapped(self, model: ModelPatcher) -> ModelPatcher:
        def tap(executor, inner, conds: list, x: Tensor, timestep: Tensor, model_options: dict):
            options = with_enter(uncompiled(model_options["transformer_options"]), self.enter)
            options = with_measure(options, self.measure, inner.diffusion_model)
            return executor(inner, conds, x, timestep, {**model_options, "transformer_options": options})

        def tap_features(executor, x: Tensor, *args, **kwargs):
            with residual_hooks(executor.class_obj, self.recording.features, self.feature):
                return executor(x, *args, **kwargs)

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, tap)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, tap_features)
        return model

    def enter(self, kind: str, rows: Inputs, extra_options: dict) -> Inputs:
        self.keep(layer_of(kind, extra_options), rows.query)
        return rows

    def feature(self, block: Block, features: Tensor) -> Tensor:
        self.keep(Layer("feature", *block, 0, *features.shape[2:]), features)
        return features

    def keep(self, layer: Layer, supplied: Tensor) -> None:
        if self.now == 0:
            self.sizes[layer] = supplied.numel()
        check_one_size(layer, self.sizes)
        within = self.steps is None or self.now in self.steps
        if within and self.recording.wants(layer, self.now / self.trajectory.steps):
            self.inputs[self.now, layer] = supplied.to(self.recording.device, self.recording.dtype, copy=True)

    def measure(self, query: Tensor, key: Tensor, extra_options: dict) -> None:
        layer = layer_of("cross", extra_options)
        if layer.positions <= MAP_POSITIONS:
            tokens = self.trajectory.conditioning[0][0].shape[1]
            check_positions_kept(query.shape[1], layer.positions)
            check_prompt_kept(key.shape[1], tokens)
            maps = token_maps(query, key, extra_options["n_heads"], tokens).unflatten(1, (layer.height, layer.width))
            self.maps[self.now].setdefault((layer.height, layer.width), []).append(maps.cpu())

    def walk(self, run: Run) -> Tensor:
        for self.now, sigma, _ in run.steps():
            x = self.trajectory.states[self.now].to(run.latent, copy=True)
            denoised = run.denoise(x, sigma)
            if self.steps is None:
                self.steps = self.recording.steps_within_budget(self.sizes, self.trajectory.steps)
                if 0 not in self.steps:
                    self.inputs.clear()
            run.report(self.now, denoised, x)
        return run.latent

    def store(self) -> AttentionStore:
        layers = tuple(self.sizes)
        inputs = tuple(
            tuple(self.inputs.get((step, layer)) for layer in layers) for step in range(self.trajectory.steps)
        )
        sizes = self.maps[0]
        means = [{size: torch.stack(maps).mean(0) for size, maps in step.items()} for step in self.maps]
        return AttentionStore(
            self.trajectory, layers, inputs, tuple(torch.stack([step[size] for step in means]) for size in sizes)
        )
