"""Recording an attention store: one row a step along a trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import NamedTuple

import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

from ..host.branch.joint import JointRows, image_attention, joint_maps
from ..host.branch.maps import token_maps
from ..host.branch.source import KEY
from ..host.dit.architectures import architecture_of, dit_blocks, grid, padded, width
from ..host.dit.attention import Attend, Joint, joint_attention
from ..host.files.store import AttentionStore
from ..host.files.trajectory import Trajectory
from ..host.layer import Block, Inputs, Layer
from ..host.run.refusals import (
    check_every_call,
    check_one_size,
    check_positions_kept,
    check_prompt_kept,
    check_readable,
    check_same_model,
    check_source,
    check_unguided,
    check_without_values,
    prompt_in_place,
)
from ..host.run.sampler import OwnSampler, Run
from ..host.run.shortcuts import uncompiled
from ..host.unet.patches import layer_of, with_enter, with_measure
from ..host.unet.tree import residual_hooks
from .p2p import NEVER, Window

MAP_POSITIONS = 32**2  # greatest h * w of a UNet's layers whose word maps are kept
JOINT_POSITIONS = 64**2  # and of their means in a flow transformer, whose layers are of one size

Part = tuple[Layer, str]
"""One tensor that may be recorded: of which layer, and in flow transformers which field of its `Inputs`, else ""."""


class Plan(NamedTuple):
    """What a store will hold. steps: those that are recorded. wanted: how many the edits read.

    inputs and maps: bytes.
    """

    steps: tuple[int, ...]
    wanted: int
    inputs: int
    maps: int


@dataclass(frozen=True)
class Recording:
    """What to record: as the edits' schedules. budget: bytes that the inputs may hold.

    features: the blocks whose residual features are kept, for the window of that name.
    layers: (block, index) of the attention layers that are kept, None for all.
    reads: what is kept of the self-attention of a flow transformer, fields of `Inputs`.
    """

    cross: Window
    self_: Window
    self_positions: float
    budget: int
    dtype: torch.dtype
    device: torch.device
    feature: Window = NEVER
    features: tuple[Block, ...] = ()
    layers: frozenset[tuple[Block, int]] | None = None
    reads: tuple[str, ...] = ("query", "key")

    def wants(self, part: Part, fraction: float) -> bool:
        layer, field = part
        if layer.kind == "feature":
            return fraction in self.feature
        if self.layers is not None and (layer.block_id, layer.index) not in self.layers:
            return False
        if layer.kind == "cross" or (field == "query" and fraction in self.cross):  # words are read by the queries
            return fraction in self.cross
        return fraction in self.self_ and layer.positions <= self.self_positions and field in ("", *self.reads)

    def plan(self, sizes: dict[Part, int], maps: int, steps: int) -> Plan:
        """What to keep, given the elements of each part, and the bytes of the maps.

        A step saves the source's row only where it is recorded whole, and all save the same: the cheapest come first.
        """
        costs = []
        for step in range(steps):
            elements = sum(size for part, size in sizes.items() if self.wants(part, step / steps))
            if elements:
                costs.append((elements * self.dtype.itemsize, step))
        kept, held = [], 0
        for cost, step in sorted(costs):
            if held + cost > self.budget:
                break
            held += cost
            kept.append(step)
        return Plan(tuple(sorted(kept)), len(costs), held, maps)


def record_attention(
    model: ModelPatcher,
    trajectory: Trajectory,
    recording: Recording,
    tell: Callable[[Plan], None] = lambda plan: None,
) -> AttentionStore:
    """Runs `model` once at every state of `trajectory` and keeps what edits read there, as far as the budget goes.

    tell: gets what the store will hold, in flow transformers before the first call, in UNets after it.

    Raises ValueError where the model is edited already or its attention unknown, or the trajectory is another model's.
    """
    check_readable(model, "Record Attention")
    check_same_model(model, trajectory)
    check_source(trajectory.conditioning)
    check_without_values(trajectory, "Record Attention")
    check_every_call(model, "Record Attention")
    if KEY in model.model_options["transformer_options"]:
        raise ValueError("Record Attention was given a MODEL that is already edited: connect the MODEL from before.")
    check_unguided(model)
    joint = architecture_of(model.model.diffusion_model) is not None
    walk = (_JointWalk if joint else _UNetWalk)(trajectory, recording, tell)
    guider = CFGGuider(walk.tapped(model))
    guider.inner_set_conds({"positive": trajectory.conditioning})
    guider.set_cfg(1.0)
    callback = latent_preview.prepare_callback(model, trajectory.steps)
    start, quiet = trajectory.states[0], not comfy.utils.PROGRESS_BAR_ENABLED
    guider.sample(torch.zeros_like(start), start, walk, trajectory.sigmas.clone(), None, callback, quiet, 0)
    return walk.store()


class _Walk(OwnSampler):
    """Visits the states of a trajectory, and keeps what flows past the attention layers. Made anew for each run."""

    def __init__(self, trajectory: Trajectory, recording: Recording, tell: Callable[[Plan], None]) -> None:
        self.trajectory, self.recording, self.tell = trajectory, recording, tell
        self.plan: Plan | None = None  # once the layers are known
        self.now = 0
        self.sizes: dict[Part, int] = {}
        self.inputs: dict[tuple[int, Part], Tensor] = {}
        # By step and size of layer: the sum of the maps, and of how many.
        self.maps: list[dict[tuple[int, int], tuple[Tensor, int]]] = [{} for _ in range(trajectory.steps)]

    @property
    def tokens(self) -> int:
        return self.trajectory.conditioning[0][0].shape[1]

    def keep(self, layer: Layer, supplied: Tensor, field: str = "") -> None:
        part = layer, field
        within = self.plan is None or self.now in self.plan.steps
        if within and self.recording.wants(part, self.now / self.trajectory.steps):
            self.inputs[self.now, part] = supplied.to(self.recording.device, self.recording.dtype, copy=True)

    def add(self, size: tuple[int, int], maps: Tensor) -> None:
        """maps: [b, h, w, tokens] of one layer."""
        total, layers = self.maps[self.now].get(size, (0, 0))
        self.maps[self.now][size] = total + maps, layers + 1

    def settle(self, maps: int) -> None:
        """Decides what is kept, once the sizes of all parts are known. maps: bytes of a step's."""
        self.plan = self.recording.plan(self.sizes, maps * self.trajectory.steps, self.trajectory.steps)
        self.tell(self.plan)

    def walk(self, run: Run) -> Tensor:
        for self.now, sigma, _ in run.steps():
            x = self.trajectory.states[self.now].to(run.latent, copy=True)
            denoised = run.denoise(x, sigma)
            found = self.maps[self.now]
            found |= {size: (maps.cpu(), layers) for size, (maps, layers) in found.items()}
            if self.plan is None:
                self.settle(sum(maps.nbytes for maps, _ in self.maps[0].values()))
                if 0 not in self.plan.steps:
                    self.inputs.clear()
            run.report(self.now, denoised, x)
        return run.latent

    def store(self) -> AttentionStore:
        inputs = tuple(
            tuple(self.inputs.get((step, part)) for part in self.sizes) for step in range(self.trajectory.steps)
        )
        means = [{size: total / layers for size, (total, layers) in step.items()} for step in self.maps]
        maps = tuple(torch.stack([step[size] for step in means]) for size in means[0])
        return AttentionStore(self.trajectory, tuple(layer for layer, _ in self.sizes), inputs, maps)


class _UNetWalk(_Walk):
    """Its layers are known once the first step has run."""

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
        self.see(layer_of(kind, extra_options), rows.query)
        return rows

    def feature(self, block: Block, features: Tensor) -> Tensor:
        self.see(Layer("feature", *block, 0, *features.shape[2:]), features)
        return features

    def see(self, layer: Layer, supplied: Tensor) -> None:
        if self.now == 0:
            self.sizes[layer, ""] = supplied.numel()
        check_one_size(layer, {known for known, _ in self.sizes})
        self.keep(layer, supplied)

    def measure(self, query: Tensor, key: Tensor, extra_options: dict) -> None:
        layer = layer_of("cross", extra_options)
        if layer.positions <= MAP_POSITIONS:
            check_positions_kept(query.shape[1], layer.positions)
            check_prompt_kept(key.shape[1], self.tokens)
            maps = token_maps(query, key, extra_options["n_heads"], self.tokens)
            self.add((layer.height, layer.width), maps.unflatten(1, (layer.height, layer.width)))


class _JointWalk(_Walk):
    """Its layers are known beforehand, and all of one size."""

    words = 0  # how many tokens of the prompt the model reads, 0 where it has none among the image's
    mapped = False  # whether maps of them are kept
    before = 0

    def tapped(self, model: ModelPatcher) -> ModelPatcher:
        def tap(executor, inner, conds: list, x: Tensor, timestep: Tensor, model_options: dict):
            options = uncompiled(model_options["transformer_options"])
            return executor(inner, conds, x, timestep, {**model_options, "transformer_options": options})

        def tap_attention(
            executor, x: Tensor, t: Tensor, c_concat, c_crossattn, control, transformer_options: dict, **kwargs
        ):
            network = executor.class_obj.diffusion_model
            with joint_attention(network, x, transformer_options, partial(self.enter, network)) as options:
                return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, tap)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, tap_attention)
        return model

    def walk(self, run: Run) -> Tensor:
        network, state = run.guider.inner_model.diffusion_model, self.trajectory.states[0]
        if not architecture_of(network).image_first:
            read = run.guider.conds["positive"][0]["model_conds"]["c_crossattn"].cond.shape[1]
            if prompt_in_place(read, self.tokens, padded(network, self.tokens)):
                self.words = min(read, self.tokens)
        if not self.words:
            self.recording = replace(self.recording, cross=NEVER)
        self.mapped = self.words > 0 and (state.ndim == 4 or state.shape[2] == 1)
        size, channels = grid(network, state), len(state) * width(network)
        for block in dit_blocks(network):
            layer = Layer("self", *block, 0, *size)
            self.sizes |= dict.fromkeys(((layer, field) for field in Inputs._fields), layer.positions * channels)
            if self.words:
                self.sizes[layer._replace(kind="cross"), "key"] = self.words * channels
        positions = math.prod(-(-side // _pooling(size)) for side in size) if self.mapped else 0
        self.settle(len(state) * positions * self.tokens * torch.float32.itemsize)
        return super().walk(run)

    def enter(
        self,
        network: nn.Module,
        joint: Joint,
        attend: Attend,
        tensors: tuple[Tensor, Tensor, Tensor],
        extra_options: dict,
    ) -> Tensor:
        rows, layer = JointRows(joint, attend, tensors, 1), joint.layer
        image = rows.image(0)
        self.before = joint.where.start
        for field, tensor in image._asdict().items():
            self.keep(layer, tensor, field)
        if self.words:
            keys, values = rows.parts(0, self.tokens, padded(network, self.tokens))
            self.keep(layer._replace(kind="cross"), keys.words, "key")
            if self.mapped:
                each = torch.eye(self.words).expand(len(image.query), -1, -1).to(tensors[0])
                attention = partial(image_attention, joint, attend, image.query, keys)
                maps = pad(joint_maps(joint, values, each, attention), (0, self.tokens - self.words))
                self.add(*_pooled(maps, (layer.height, layer.width)))
        return attend(*tensors)

    def store(self) -> AttentionStore:
        fields = tuple(field for _, field in self.sizes)
        return super().store()._replace(fields=fields, before=self.before)


def _pooling(size: tuple[int, int]) -> int:
    """How many positions a side become one in word maps of a flow transformer."""
    return next(by for by in count(1) if math.prod(-(-side // by) for side in size) <= JOINT_POSITIONS)


def _pooled(maps: Tensor, size: tuple[int, int]) -> tuple[tuple[int, int], Tensor]:
    """The size of word maps [b, positions, tokens] once they are small enough, and these, [b, h, w, tokens]."""
    maps = maps.unflatten(1, size)
    if (by := _pooling(size)) > 1:
        maps = avg_pool2d(maps.movedim(-1, 1), by, ceil_mode=True).movedim(1, -1)
    return tuple(maps.shape[1:3]), maps
