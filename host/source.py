"""The source branch: a trajectory's row joins every model call, and the target's row reads from it inside the UNet.

The source state is looked up at each sigma and never integrated, so it cannot drift: this is Direct Inversion
(arXiv 2310.01506) without its correction pass. Edits are rules for what the target reads before the projections of an
attention layer; several edits on one MODEL share one branch. Where no edit wants the source, it does not join.

Three wrappers do it: OUTER_SAMPLE checks the run and lets the host process the source conditioning beside the others,
CALC_COND_BATCH appends it to the model call, APPLY_MODEL puts the trajectory's state into its rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.sampler_helpers import convert_cond
from comfy.samplers import CFGGuider, Sampler, can_concat_cond, get_area_and_mult
from torch import Tensor

from .layer import Edit, Inputs, Layer
from .refusals import check_part, check_run, check_same_model, check_source, check_start, check_unet
from .trajectory import Trajectory

KEY = "palimpsest"
RUN, CALL, CHUNKS = f"{KEY}.run", f"{KEY}.call", f"{KEY}.chunks"
OWN = ("control", "gligen")  # what the host hands on from the positive conditioning to all others


@dataclass(frozen=True)
class SourceBranch:
    """What a MODEL carries: the source and the edits that read from it. Immutable; the state of a run is in `_Run`."""

    trajectory: Trajectory
    edits: tuple[Edit, ...] = ()


def attach(model: ModelPatcher, trajectory: Trajectory, edit: Edit) -> ModelPatcher:
    """A clone of `model` whose target reads from `trajectory` by `edit`, and by the edits that it already carries.

    Raises ValueError where the trajectory is another model's, or another than that of the edits before, or where the
    model already carries an edit of this kind.
    """
    check_unet(model)
    check_same_model(model, trajectory)
    check_source(trajectory.conditioning)
    model = model.clone()
    options = model.model_options["transformer_options"]
    branch = options.get(KEY)
    if branch is None:
        branch = SourceBranch(trajectory)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _calc_cond_batch)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _apply_model)
    elif not torch.equal(branch.trajectory.states, trajectory.states):
        raise ValueError("Two edits on this MODEL read from different trajectories: connect the same one to both.")
    if any(type(other) is type(edit) for other in branch.edits):
        raise ValueError("This MODEL already carries such an edit: write all its words into one Prompt Edit.")
    options[KEY] = replace(branch, edits=(*branch.edits, edit))
    return model


class _Run:
    """One sampling run: the guider whose processed conditionings tell source and target, and the checked start."""

    def __init__(self, branch: SourceBranch, guider: CFGGuider) -> None:
        self.branch, self.guider = branch, guider
        self.started = False

    @property
    def source(self) -> dict:
        """The processed source conditioning, with the ControlNet and GLIGEN that made the trajectory and no others."""
        own = self.branch.trajectory.conditioning[0][1]
        return {key: value for key, value in self.guider.conds[KEY][0].items() if key not in OWN or key in own}

    def call(self, conds: list[list[dict] | None], x: Tensor, timestep: Tensor) -> _Call | None:
        """The source's part in one model call, or None where no edit or no target takes part."""
        trajectory, sigma = self.branch.trajectory, float(timestep[0])
        index = trajectory.index(sigma)
        if index is None:
            raise ValueError(
                f"The sampler asks for sigma {sigma:.4g}, which the trajectory does not hold: "
                "choose a sampler that stays on its schedule, such as euler, ddim or dpmpp_2m."
            )
        state = trajectory.states[index].to(x)
        check_part(x, state)
        if not self.started:
            check_start(x, trajectory.states[0].to(x), index)
            self.started = True
        fraction = index / trajectory.steps
        edits = tuple(edit for edit in self.branch.edits if edit.active(fraction))
        targets = {cond["uuid"] for cond in self.guider.conds["positive"]}
        target = next((i for i, cond in enumerate(conds) if cond and cond[0]["uuid"] in targets), None)
        if not edits or target is None:
            return None
        tokens = self.source["cross_attn"].shape[1], conds[target][0]["cross_attn"].shape[1]
        return _Call(edits, fraction, state.expand_as(x), len(conds), target, tokens)


@dataclass
class _Call:
    """One model call. Chunks are known by their cond index; each is an equal share of the rows of a batch."""

    edits: tuple[Edit, ...]
    fraction: float
    state: Tensor  # [b, c, h, w]
    source: int
    target: int
    tokens: tuple[int, int]  # of the source's and of the target's prompt, before the host tiles them
    kept: dict[Layer, Inputs] = field(default_factory=dict)  # of a source chunk that ran before the target's

    def patches(self) -> dict:
        return {"attn1_patch": [self.self_attention], "attn2_patch": [self.cross_attention]}

    def self_attention(self, query: Tensor, key: Tensor, value: Tensor, extra_options: dict) -> Inputs:
        return self.attention("self", Inputs(query, key, value), extra_options)

    def cross_attention(self, query: Tensor, key: Tensor, value: Tensor, extra_options: dict) -> Inputs:
        return self.attention("cross", Inputs(query, key, value), extra_options)

    def attention(self, kind: str, rows: Inputs, extra_options: dict) -> Inputs:
        """The rows of all chunks of a UNet call, with the target's replaced by what the edits let it read."""
        layer = Layer(kind, *extra_options["block"], extra_options["block_index"], rows.query.shape[1])
        edits = [edit for edit in self.edits if edit.wants(layer, self.fraction)]
        if not edits:
            return rows
        chunks = extra_options[CHUNKS]
        if self.source in chunks:
            source = self.chunk(rows, chunks, self.source, kind)
            if self.target not in chunks:
                self.kept[layer] = source
        if self.target not in chunks:
            return rows
        if self.source not in chunks:
            source = self.kept.pop(layer)
        target = self.chunk(rows, chunks, self.target, kind)
        for edit in edits:
            target = edit.read(layer, source, target)
        return _with_rows(rows, _slice(rows.query, chunks, self.target), target)

    def chunk(self, rows: Inputs, chunks: list[int], index: int, kind: str) -> Inputs:
        """One chunk's inputs, its tokens folded back to those of its own prompt."""
        inputs = Inputs(*(t[_slice(t, chunks, index)] for t in rows))
        if kind == "self":
            return inputs
        tokens = self.tokens[0 if index == self.source else 1]
        if inputs.key.shape[1] % tokens:
            raise ValueError(
                f"Another patch changed the prompt from {tokens} to {inputs.key.shape[1]} tokens inside the model: "
                "remove it, or move it to a MODEL without Palimpsest's edits."
            )
        return Inputs(inputs.query, inputs.key[:, :tokens], inputs.value[:, :tokens])


def _outer_sample(
    executor, noise: Tensor, latent_image: Tensor, sampler: Sampler, sigmas: Tensor, denoise_mask, *args, **kwargs
):
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]  # the host's copy for this run alone
    branch = options[KEY]
    check_run(branch.trajectory, guider, noise, sampler, sigmas, denoise_mask)
    positive = guider.conds["positive"][0]["cross_attn"]
    for edit in branch.edits:
        edit.check(positive)
    ((embedding, own),) = branch.trajectory.conditioning
    guider.conds[KEY] = convert_cond([[embedding.to(positive), own]])
    options[RUN] = _Run(branch, guider)
    try:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    finally:
        del options[RUN], guider.conds[KEY]


def _calc_cond_batch(executor, model, conds: list, x_in: Tensor, timestep: Tensor, model_options: dict):
    options = model_options["transformer_options"]
    run = options.get(RUN)
    call = run and run.call(conds, x_in, timestep)
    if not call:
        return executor(model, conds, x_in, timestep, model_options)
    patches = dict(options.get("patches", {}))
    for name, added in call.patches().items():  # before other packs', which may tile or merge positions
        patches[name] = [*added, *patches.get(name, [])]
    model_options = {**model_options, "transformer_options": {**options, "patches": patches, CALL: call}}
    source = run.source
    if _one_call(source, conds[call.target][0], x_in, timestep):
        return executor(model, [*conds, [source]], x_in, timestep, model_options)[: len(conds)]
    # The host would run the target before the source, or compute its ControlNet from the target's latent.
    executor(model, [None] * len(conds) + [[source]], call.state, timestep, model_options)
    return executor(model, conds, x_in, timestep, model_options)


def _apply_model(executor, x: Tensor, t: Tensor, c_concat, c_crossattn, control, transformer_options: dict, **kwargs):
    call = transformer_options.get(CALL)
    if call:
        chunks = transformer_options["cond_or_uncond"]
        if call.source in chunks:
            where = _slice(x, chunks, call.source)
            check_part(x[where], call.state)
            x = x.clone()
            x[where] = call.state
        # Other packs index pairs by these numbers: to them the source is one more row of the target's kind.
        seen = [call.target if index == call.source else index for index in chunks]
        transformer_options = {**transformer_options, CHUNKS: chunks, "cond_or_uncond": seen}
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


def _one_call(source: dict, target: dict, x: Tensor, timestep: Tensor) -> bool:
    """Whether the host can run source and target in one call, or else split them with the source first."""
    mine, other = get_area_and_mult(source, x, timestep), get_area_and_mult(target, x, timestep)
    return source.get("control") is None and mine.hooks == other.hooks and can_concat_cond(mine, other)


def _slice(tensor: Tensor, chunks: list[int], index: int) -> slice:
    size = len(tensor) // len(chunks)
    at = chunks.index(index)
    return slice(at * size, (at + 1) * size)


def _with_rows(rows: Inputs, where: slice, new: Inputs) -> Inputs:
    """`rows` with those at `where` replaced; token counts that differ are tiled, which leaves attention unchanged."""
    tokens = math.lcm(rows.key.shape[1], new.key.shape[1])

    def placed(old: Tensor, part: Tensor, length: int) -> Tensor:
        old = old.repeat(1, length // old.shape[1], 1)  # a copy: the host shares these tensors between arguments
        old[where] = part.repeat(1, length // part.shape[1], 1)
        return old

    query = placed(rows.query, new.query, rows.query.shape[1])
    return Inputs(query, placed(rows.key, new.key, tokens), placed(rows.value, new.value, tokens))
