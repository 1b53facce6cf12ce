"""The source branch: a trajectory's row joins every model call, and the target's row reads from it inside the network.

The source state is looked up at each sigma and never integrated, so it cannot drift: this is Direct Inversion
(arXiv 2310.01506) without its correction pass. Edits are rules for what the target reads before the projections of an
attention layer; several edits on one MODEL share one branch. Where no edit wants the source, or an attention store
holds what they want, it does not join.

OUTER_SAMPLE checks the run and lets the host process the source conditioning beside the others, CALC_COND_BATCH
appends it to the model call, APPLY_MODEL puts the trajectory's state into its rows, and PREDICT_NOISE blends. In an
edit without inversion (`virtual`) the run gives the source's states, and takes its prediction from the call as well.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from comfy.controlnet import ControlBase
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.sampler_helpers import convert_cond
from comfy.samplers import CFGGuider, Sampler, can_concat_cond, get_area_and_mult
from torch import Tensor, nn

from ..dit.architectures import architecture_of, grid
from ..dit.attention import joint_attention
from ..files.store import AttentionStore
from ..files.trajectory import Trajectory
from ..layer import Blend, Block, Edit, Inputs, Layer, Rule, fields_read
from ..run.model import is_flow, is_unet, noise_latent, start_of
from ..run.refusals import (
    check_all_images,
    check_in_place,
    check_layout,
    check_one_frame,
    check_one_model,
    check_one_state,
    check_part,
    check_readable,
    check_run,
    check_same_model,
    check_source,
    check_source_negative,
    check_start,
    check_states_known,
    check_worded,
)
from ..run.sampler import told_mismatch
from ..run.schedule import step_of
from ..run.shortcuts import uncached, uncompiled, unread
from ..unet.patches import with_attend, with_enter, with_measure
from ..unet.tree import residual_hooks
from .call import CHUNKS, KEY, Call, place, slice_of
from .maps import WordMaps, map_size

RUN, CALL, STATE = f"{KEY}.run", f"{KEY}.call", f"{KEY}.state"
OWN = ("control", "gligen")  # what the host hands on from the positive conditioning to all others


@dataclass(frozen=True)
class SourceBranch:
    """What a MODEL carries: the source and what reads from it. Immutable; the state of a run is in `_Run`.

    virtual: whether a run gives the source's states itself, at sigmas of its own, and reads the source's prediction,
    which is guided by the sampler's negative prompt where cfg is not 1.
    """

    trajectory: Trajectory
    edits: tuple[Edit, ...] = ()
    store: AttentionStore | None = None
    blend: Blend | None = None
    virtual: bool = False
    cfg: float = 1.0


def attach(
    model: ModelPatcher, trajectory: Trajectory, edit: Edit, store: AttentionStore | None = None
) -> ModelPatcher:
    """A clone of `model` whose target reads from `trajectory` by `edit`, and by the edits that it already carries.

    Where `store` holds all that the edits want at a step, the source's row stays out of it. Raises ValueError where
    trajectory or store are another model's, or others than those of the edits before, or where the model already
    carries an edit of this kind.
    """
    check_readable(model, edit.node)
    model, branch = branched(model, trajectory)
    if any(type(other) is type(edit) for other in branch.edits):
        raise ValueError(f"This MODEL already carries a {edit.node}: write the whole edit into one such node.")
    if store is not None:
        check_states_known(branch.virtual, "An attention store")
    if store is not None and not torch.equal(store.trajectory.states, trajectory.states):
        raise ValueError("The attention store was recorded from another trajectory: record it from this edit's.")
    if store is not None and branch.store is not None and store is not branch.store:
        raise ValueError("Two edits on this MODEL read from different attention stores: connect the same one to both.")
    branch = replace(branch, edits=(*branch.edits, edit), store=store or branch.store)
    model.model_options["transformer_options"][KEY] = branch
    return model


def attach_blend(model: ModelPatcher, trajectory: Trajectory, blend: Blend) -> ModelPatcher:
    """A clone of `model` whose samples are the source outside the blend's mask. Raises ValueError as `attach`."""
    if blend.columns is not None:
        check_worded(model, "Local Blend")
        if blend.layout:
            check_layout(model)
    model, branch = branched(model, trajectory)
    check_states_known(branch.virtual, "Local Blend")
    if branch.blend is not None:
        raise ValueError("This MODEL already carries a Local Blend: write all its words and masks into one.")
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)
    model.model_options["transformer_options"][KEY] = replace(branch, blend=blend)
    return model


def with_state(model_options: dict, state: Tensor) -> dict:
    """The options of a model call that the source joins with `state`, in place of the trajectory's at that sigma.

    For samplers that call the model at more states than one a sigma; state: [1 or b, c, h, w] in sampler space.
    """
    return {**model_options, "transformer_options": {**model_options["transformer_options"], STATE: state}}


def branched(model: ModelPatcher, trajectory: Trajectory) -> tuple[ModelPatcher, SourceBranch]:
    """A clone of `model` that runs beside `trajectory`, and its branch. Raises ValueError as `attach`."""
    check_same_model(model, trajectory)
    check_source(trajectory.conditioning)
    model = model.clone()
    branch = model.model_options["transformer_options"].get(KEY)
    if branch is None:
        branch = SourceBranch(trajectory)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _calc_cond_batch)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _apply_model)
        if is_unet(model):
            model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _diffusion_model)
    else:
        check_same_states(model, trajectory)
    return model, branch


def check_same_states(model: ModelPatcher, trajectory: Trajectory) -> None:
    """Raises ValueError where a model with a source branch meets another source."""
    branch = model.model_options["transformer_options"][KEY]
    if torch.equal(branch.trajectory.states, trajectory.states):
        return
    if branch.virtual:
        raise ValueError(
            "This MODEL edits by Virtual Inversion or Flow Edit, which takes no trajectory but its own: connect the "
            "trajectory output of that Virtual Inversion, or the trajectory that Flow Edit follows."
        )
    raise ValueError("Two edits on this MODEL read from different trajectories: connect the same one to both.")


class _Run:
    """One sampling run: the guider whose processed conditionings tell source and target, and what was measured."""

    def __init__(self, branch: SourceBranch, guider: CFGGuider, images: int, sigmas: Tensor, adds_noise: bool) -> None:
        self.branch, self.guider, self.images = branch, guider, images
        self.sigmas, self.adds_noise = sigmas, adds_noise
        self.started = False
        self.live: set[int] = set()  # the steps at which the source's row took part
        self.unmapped = False  # whether the store's word maps are of another size than those that the blend compares
        self.maps: dict[int, tuple[Tensor, Tensor]] = {}  # by step: word maps of source and target
        self.predicted: Tensor | None = None  # the source's denoised estimate, guided, where it is read
        self.apart: Tensor | None = None  # the target's less the source's there, each by its prompt alone

    @property
    def source(self) -> dict:
        """The processed source conditioning, with the ControlNet and GLIGEN that made the trajectory and no others."""
        own = self.branch.trajectory.conditioning[0][1]
        return {key: value for key, value in self.guider.conds[KEY][0].items() if key not in OWN or key in own}

    @property
    def negative(self) -> dict:
        """The processed prompt by which the source's prediction is guided."""
        check_source_negative(self.guider.conds.get("negative"))
        (cond,), source = self.guider.conds["negative"], self.source
        negative = {key: value for key, value in cond.items() if key not in OWN}
        # Apply ControlNet gives the hint to both prompts, or leaves the negative to the host.
        if "control" in source and ("control" in cond or source.get("control_apply_to_uncond")):
            negative["control"] = source["control"]
        return negative

    @property
    def advice(self) -> str:
        """What to change for a store to spare the source's row."""
        blend = self.branch.blend
        if blend is not None and blend.columns is not None and blend.layout:
            return "it holds no self-attention maps: set mask_from of Local Blend to words."
        if self.unmapped:
            return (
                "it holds no word maps of the size that Local Blend reads in so large a picture: take a smaller one, "
                "or a mask without words."
            )
        return (
            "raise the fractions of Record Attention, its self_max_side or its budget_mb, and give it the blocks and "
            "reads of the edit."
        )

    def step(self, sigma: float) -> tuple[int | None, int]:
        """Which step a call at `sigma` belongs to, and of how many; None where the trajectory has no such sigma."""
        if self.branch.virtual:
            return step_of(self.sigmas, sigma), len(self.sigmas) - 1
        return self.branch.trajectory.index(sigma), self.branch.trajectory.steps

    def state(self, x: Tensor, index: int, given: Tensor | None = None) -> Tensor:
        """[1 or b, c, h, w]: the trajectory's state beside x, or the one `given` in its place.

        The run has to have begun where the source does.
        """
        trajectory = self.branch.trajectory
        state = (trajectory.states[index] if given is None else given).to(x, copy=True)
        check_all_images(x, self.images)
        check_part(x, state)
        if not self.started and given is None:  # a sampler that gives states has checked its own start
            check_start(x, trajectory, index, self.sigmas, self.adds_noise)
            self.started = True
        return state

    def call(
        self, model: BaseModel, conds: list[list[dict] | None], x: Tensor, timestep: Tensor, options: dict
    ) -> Call | None:
        """The source's part in one model call, or None where nothing reads from it.

        options: the call's transformer options; they may hold another state of the source than the trajectory's.
        """
        sigma, given = float(timestep[0]), options.get(STATE)
        index, steps = self.step(sigma)
        if index is None:
            raise ValueError(
                f"The sampler asks for sigma {sigma:.4g}, which the trajectory does not hold: "
                "choose a sampler that stays on its schedule, such as euler, ddim or dpmpp_2m."
            )
        if given is not None:
            parts = {"An attention store": self.branch.store, "Local Blend": self.branch.blend}
            check_one_state([name for name, part in parts.items() if part is not None])
        state = self.state(x, index, given)
        positive = self.guider.conds["positive"]
        target = place(conds, positive)
        rules = [rule for edit in self.branch.edits if (rule := edit.at(index / steps))]
        if target is None:  # a guider that calls prompt by prompt, or a node that calls the negative again
            rules = [rule for rule in rules if rule.everyone]
        word_maps = None if target is None else self.word_maps(index, x)
        present = [i for i, _ in _running(conds, x, timestep)]
        if not present or (not rules and word_maps is None and not self.predicts(target)):
            return None
        for rule in rules:
            check_one_model(model, self.guider, rule.node)
        kept = None
        own = self.guider.model_options["transformer_options"]
        if options.get("patches_replace") == own.get("patches_replace"):  # or else the source runs with the others too
            kept = self.stored(index, rules, word_maps)
            if kept is None:
                self.live.add(index)
        tokens = self.source["cross_attn"].shape[1], positive[0]["cross_attn"].shape[1]
        source = len(conds) if kept is None else None
        beside = len(conds) + 1 if self.predicts(target) and self.branch.cfg != 1 else None
        before = 0 if kept is None else self.branch.store.before
        values = None if self.branch.trajectory.values is None else self.branch.trajectory.values[index].to(x)
        return Call(rules, index, state, source, target, present, tokens, word_maps, beside, kept or {}, before, values)

    def predicts(self, target: int | None) -> bool:
        """Whether the source's prediction is read from a call with the target in it: the first of a step."""
        return self.branch.virtual and target is not None and self.predicted is None

    def word_maps(self, index: int, x: Tensor) -> WordMaps | None:
        """What to measure in this call: the blend's phrases, once a step."""
        blend = self.branch.blend
        if blend is None or blend.columns is None or index in self.maps:
            return None
        check_one_frame(x)
        images = torch.arange(len(x))
        columns = tuple(columns[images % len(columns)].to(x.device) for columns in blend.columns)
        network = self.guider.model_patcher.model.diffusion_model
        size = map_size(tuple(x.shape[2:])) if architecture_of(network) is None else grid(network, x)
        return WordMaps(columns, size, blend.layout)

    def stored(self, index: int, rules: list[Rule], word_maps: WordMaps | None) -> dict[Layer, Inputs] | None:
        """What the store holds for this step, None where it lacks anything and the source itself has to join."""
        store = self.branch.store
        if store is None:
            return None
        if word_maps is not None and word_maps.layout:
            return None
        if word_maps is not None:
            of_source = store.word_maps(index, word_maps.columns[0], word_maps.size)
            if of_source is None:
                self.unmapped = True
                return None
            word_maps.give_source(of_source)
        if store.fields:
            return store.joint_at(index, {layer: fields_read(layer, rules) for layer in store.layers})
        features = {block for rule in rules for block in rule.features}
        recorded = [layer for layer in store.layers if layer.kind == "feature" and layer.block_id in features]
        if len(recorded) < len(features):
            return None
        attention = [layer for layer in store.layers if layer.kind != "feature"]
        return store.at(index, recorded + [layer for layer in attention if any(rule.wants(layer) for rule in rules)])

    def blend(self, x: Tensor, index: int, state: Tensor) -> Tensor:
        """x at a step of the trajectory, with `state` outside the blend's mask: exactly x at 1, exactly it at 0."""
        blend = self.branch.blend
        if not blend.applies(index / self.branch.trajectory.steps) or (blend.columns is not None and not self.maps):
            return x
        source, target = (sum(maps) for maps in zip(*self.maps.values(), strict=True)) if self.maps else (None, None)
        mask = blend.mask(source, target, tuple(x.shape[-2:])).to(x)
        mask = mask if x.ndim == 4 else mask.unsqueeze(2)  # the same for every frame
        return torch.where(mask == 1, x, state + mask * (x - state))


def _outer_sample(
    executor, noise: Tensor, latent_image: Tensor, sampler: Sampler, sigmas: Tensor, denoise_mask, *args, **kwargs
):
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]  # the host's copy for this run alone
    branch = options[KEY]
    if not branch.virtual:
        check_run(branch.trajectory, guider, noise, latent_image, sampler, sigmas, denoise_mask)
        if mismatch := told_mismatch(sampler, branch.trajectory):
            logging.warning(f"Palimpsest: {mismatch}")
    positive = guider.conds["positive"][0]["cross_attn"]
    for part in (*branch.edits, branch.blend):
        if part is not None:
            part.check(positive, len(noise))
    if branch.blend is not None:
        check_in_place(sampler, "Local Blend")
    ((embedding, own),) = branch.trajectory.conditioning
    if own.get("control") is not None:
        own = {**own, "control": _apart(own["control"])}
    guider.conds[KEY] = convert_cond([[embedding.to(positive), own]])
    run = options[RUN] = _Run(branch, guider, len(noise), sigmas, bool(noise.any()))
    if not branch.virtual and is_flow(guider.model_patcher) and branch.trajectory.index(float(sigmas[0])) == 0:
        # At sigma 1 the sampler would begin at 0 whatever its latent.
        noise, latent_image = (t.to(noise).expand_as(noise) for t in start_of(guider.model_patcher, branch.trajectory))
    try:
        # A copy: uni_pc writes to the schedule that it is given, which the host keeps for the next run.
        result = executor(noise, latent_image, sampler, sigmas.clone(), denoise_mask, *args, **kwargs)
        if branch.store is not None and run.live:
            logging.warning(
                f"Palimpsest: the attention store lacks {len(run.live)} of {branch.trajectory.steps} steps, which ran "
                f"with the source's row: {run.advice}"
            )
        end = branch.trajectory.index(float(sigmas[-1]))
        if branch.blend is None or end is None:
            return result
        state = noise_latent(guider.model_patcher, branch.trajectory, end)
        return run.blend(result, end, state.to(result))
    finally:
        del options[RUN], guider.conds[KEY]


def _predict_noise(executor, x: Tensor, timestep: Tensor, model_options: dict, *args, **kwargs):
    run = model_options["transformer_options"][RUN]
    index = run.branch.trajectory.index(float(timestep[0]))
    if index is not None and index > 0:
        # In place: this is the sampler's own x, and the step that it takes from here starts at the blended state.
        x.copy_(run.blend(x, index, run.branch.trajectory.states[index].to(x)))
    return executor(x, timestep, model_options, *args, **kwargs)


def _calc_cond_batch(executor, model, conds: list, x_in: Tensor, timestep: Tensor, model_options: dict):
    options = model_options["transformer_options"]
    run = options.get(RUN)
    call = run and run.call(model, conds, x_in, timestep, options)
    if not call:
        return executor(model, conds, x_in, timestep, model_options)
    options = {**(uncompiled(options) if call.reads else unread(options, KEY)), CALL: call}
    if call.reads and isinstance(model.diffusion_model, UNetModel):
        options = with_enter(options, call.attention, call.leave)
    if call.word_maps is not None and isinstance(model.diffusion_model, UNetModel):
        options = with_measure(options, call.measure, model.diffusion_model)
    model_options = {**model_options, "transformer_options": options}
    joined = conds
    if call.source is not None:
        source = run.source
        extra = [[source]] if call.beside is None else [[source], [run.negative]]
        if len(call.state) == len(x_in) and _one_call(source, call, conds, x_in, timestep):
            joined = [*conds, *extra]
        else:
            # One row serves a batch of targets. Or the host would run another prompt before the source, or compute the
            # source's ControlNet from the target's latent.
            alone = [*[None] * len(conds), *extra]
            answers = executor(model, alone, call.state, timestep[: len(call.state)], model_options)
    results = executor(model, joined, x_in, timestep, model_options)
    if run.predicts(call.target):
        predictions = answers if joined is conds else results
        run.predicted = predictions[call.source]
        run.apart = results[call.target] - run.predicted
        if call.beside is not None:
            negative = predictions[call.beside]
            run.predicted = negative + run.branch.cfg * (run.predicted - negative)
    results = results[: len(conds)]
    if call.word_maps is not None and call.target in call.ran:
        run.maps[call.index] = call.word_maps.means()
    return results


def _apply_model(executor, x: Tensor, t: Tensor, c_concat, c_crossattn, control, transformer_options: dict, **kwargs):
    call = transformer_options.get(CALL)
    if not call:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    chunks, size = transformer_options["cond_or_uncond"], len(x)
    # Other packs index pairs by these numbers: to them the source is one more row of the target's kind, after it, or of
    # another's where there is no target.
    order = sorted(range(len(chunks)), key=lambda at: chunks[at] in call.at_source)
    chunks = [chunks[at] for at in order]
    like = call.present[0] if call.target is None else call.target
    seen = [like if index in call.at_source else index for index in chunks]
    transformer_options = {**transformer_options, CHUNKS: chunks, "cond_or_uncond": seen}
    if "uuids" in transformer_options:
        transformer_options["uuids"] = [transformer_options["uuids"][at] for at in order]
    if set(chunks) <= call.at_source:
        transformer_options = uncached(transformer_options)  # what others read from is never left out

    def ordered(value, order: list[int] = order):
        rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == size
        return torch.cat([value.chunk(len(order))[at] for at in order]) if rows else value

    x, t, c_concat, c_crossattn = (ordered(value) for value in (x, t, c_concat, c_crossattn))
    check_part(x[slice_of(x, chunks, 0)], call.state)
    for at, index in enumerate(chunks):
        if index in call.at_source:
            x[slice_of(x, chunks, at)] = call.state
    kwargs = {name: ordered(value) for name, value in kwargs.items()}
    with _reading(executor.class_obj.diffusion_model, call, x, transformer_options) as options:
        result = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    return ordered(result, [order.index(at) for at in range(len(order))])


def _reading(model: nn.Module, call: Call, x: Tensor, options: dict) -> AbstractContextManager[dict]:
    """The options of a call of a flow transformer of whose attention anything is read; other options as they are."""
    if not call.reads or architecture_of(model) is None:
        return nullcontext(options)
    return joint_attention(model, x, options, partial(call.joint, model))


def _diffusion_model(executor, x: Tensor, timesteps: Tensor, context, y, control, transformer_options: dict, **kwargs):
    call = transformer_options.get(CALL)
    if not call:
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
    blocks = {block for rule in call.rules for block in rule.features}

    def inject(block: Block, features: Tensor) -> Tensor:
        return call.feature(block, features, transformer_options[CHUNKS])

    options = with_attend(transformer_options, "self", call.attend, executor.class_obj)
    with residual_hooks(executor.class_obj, blocks, inject):
        return executor(x, timesteps, context, y, control, options, **kwargs)


def _running(conds: list[list[dict] | None], x: Tensor, timestep: Tensor) -> list[tuple[int, Any]]:
    """Every entry of a call's conditionings that runs at this time, as the host prepares it, with its cond index."""
    prepared = [(i, get_area_and_mult(entry, x, timestep)) for i, cond in enumerate(conds) for entry in cond or ()]
    return [(i, entry) for i, entry in prepared if entry is not None]


def _apart(control: ControlBase) -> ControlBase:
    """A ControlNet that the target may have as well: a copy where its hints are of several images, of which the
    source's call for one image would leave it the first alone.
    """
    before = control.previous_controlnet
    previous = None if before is None else _apart(before)
    if previous is before and (control.cond_hint_original is None or len(control.cond_hint_original) == 1):
        return control
    return control.copy().set_previous_controlnet(previous)


def _one_call(source: dict, call: Call, conds: list[list[dict] | None], x: Tensor, timestep: Tensor) -> bool:
    """Whether the source can be one of a call's prompts: where others read from it, the host has to run it with all of
    them, or else first.
    """
    if not call.reads and source.get("control") is None:
        return True
    mine, others = get_area_and_mult(source, x, timestep), [entry for _, entry in _running(conds, x, timestep)]
    return source.get("control") is None and all(
        mine.hooks == other.hooks and can_concat_cond(mine, other) for other in others
    )
