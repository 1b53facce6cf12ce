"""The source branch: a trajectory's row joins every model call, and the target's row reads from it inside the UNet.

The source state is looked up at each sigma and never integrated, so it cannot drift: this is Direct Inversion
(arXiv 2310.01506) without its correction pass. Edits are rules for what the target reads before the projections of an
attention layer; several edits on one MODEL share one branch. Where no edit wants the source, or an attention store
holds what they want, it does not join.

OUTER_SAMPLE checks the run and lets the host process the source conditioning beside the others, CALC_COND_BATCH
appends it to the model call, APPLY_MODEL puts the trajectory's state into its rows, and PREDICT_NOISE blends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.sampler_helpers import convert_cond
from comfy.samplers import CFGGuider, Sampler, can_concat_cond, get_area_and_mult
from torch import Tensor

from .layer import Blend, Block, Edit, Inputs, Layer, Read, Rule
from .maps import WordMaps, map_size, token_maps
from .patches import layer_of, with_enter, with_measure
from .refusals import (
    check_in_place,
    check_part,
    check_positions_kept,
    check_prompt_kept,
    check_run,
    check_same_model,
    check_source,
    check_start,
    check_unet,
)
from .store import AttentionStore
from .trajectory import Trajectory
from .unet import residual_hooks

KEY = "palimpsest"
RUN, CALL, CHUNKS, READS = f"{KEY}.run", f"{KEY}.call", f"{KEY}.chunks", f"{KEY}.reads"
OWN = ("control", "gligen")  # what the host hands on from the positive conditioning to all others
TERM = -1  # stands for a further term of the target's attention among the cond indices of a call


@dataclass(frozen=True)
class SourceBranch:
    """What a MODEL carries: the source and what reads from it. Immutable; the state of a run is in `_Run`."""

    trajectory: Trajectory
    edits: tuple[Edit, ...] = ()
    store: AttentionStore | None = None
    blend: Blend | None = None


def attach(
    model: ModelPatcher, trajectory: Trajectory, edit: Edit, store: AttentionStore | None = None
) -> ModelPatcher:
    """A clone of `model` whose target reads from `trajectory` by `edit`, and by the edits that it already carries.

    Where `store` holds all that the edits want at a step, the source's row stays out of it. Raises ValueError where
    trajectory or store are another model's, or others than those of the edits before, or where the model already
    carries an edit of this kind.
    """
    model, branch = _branched(model, trajectory)
    if any(type(other) is type(edit) for other in branch.edits):
        raise ValueError("This MODEL already carries such an edit: one node of a kind has to do all that it is to do.")
    if store is not None and not torch.equal(store.trajectory.states, trajectory.states):
        raise ValueError("The attention store was recorded from another trajectory: record it from this edit's.")
    if store is not None and branch.store is not None and store is not branch.store:
        raise ValueError("Two edits on this MODEL read from different attention stores: connect the same one to both.")
    branch = replace(branch, edits=(*branch.edits, edit), store=store or branch.store)
    model.model_options["transformer_options"][KEY] = branch
    return model


def attach_blend(model: ModelPatcher, trajectory: Trajectory, blend: Blend) -> ModelPatcher:
    """A clone of `model` whose samples are the source outside the blend's mask. Raises ValueError as `attach`."""
    model, branch = _branched(model, trajectory)
    if branch.blend is not None:
        raise ValueError("This MODEL already carries a Local Blend: write all its words and masks into one.")
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)
    model.model_options["transformer_options"][KEY] = replace(branch, blend=blend)
    return model


def _branched(model: ModelPatcher, trajectory: Trajectory) -> tuple[ModelPatcher, SourceBranch]:
    check_unet(model)
    check_same_model(model, trajectory)
    check_source(trajectory.conditioning)
    model = model.clone()
    branch = model.model_options["transformer_options"].get(KEY)
    if branch is None:
        branch = SourceBranch(trajectory)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _calc_cond_batch)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _apply_model)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _diffusion_model)
    elif not torch.equal(branch.trajectory.states, trajectory.states):
        raise ValueError("Two edits on this MODEL read from different trajectories: connect the same one to both.")
    return model, branch


class _Run:
    """One sampling run: the guider whose processed conditionings tell source and target, and what was measured."""

    def __init__(self, branch: SourceBranch, guider: CFGGuider) -> None:
        self.branch, self.guider = branch, guider
        self.started = False
        self.maps: dict[int, tuple[Tensor, Tensor]] = {}  # by step: word maps of source and target

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
        targets = {cond["uuid"] for cond in self.guider.conds["positive"]}
        target = next((i for i, cond in enumerate(conds) if cond and cond[0]["uuid"] in targets), None)
        if target is None:
            return None
        rules = [rule for edit in self.branch.edits if (rule := edit.at(index / trajectory.steps))]
        word_maps = self.word_maps(index, x)
        if not rules and word_maps is None:
            return None
        kept = self.stored(index, rules, word_maps)
        tokens = self.source["cross_attn"].shape[1], conds[target][0]["cross_attn"].shape[1]
        source = len(conds) if kept is None else None
        present = [i for i, cond in enumerate(conds) if cond]
        return _Call(rules, index, state, source, target, present, tokens, word_maps, kept or {})

    def word_maps(self, index: int, x: Tensor) -> WordMaps | None:
        """What to measure in this call: the blend's phrases, once a step."""
        blend = self.branch.blend
        if blend is None or blend.columns is None or index in self.maps:
            return None
        images = torch.arange(len(x))
        columns = tuple(columns[images % len(columns)].to(x.device) for columns in blend.columns)
        return WordMaps(columns, map_size(tuple(x.shape[2:])))

    def stored(self, index: int, rules: list[Rule], word_maps: WordMaps | None) -> dict[Layer, Inputs] | None:
        """What the store holds for this step, None where it lacks anything and the source itself has to join."""
        store = self.branch.store
        if store is None:
            return None
        if word_maps is not None:
            of_source = store.word_maps(index, word_maps.columns[0], word_maps.size)
            if of_source is None:
                return None
            word_maps.give_source(of_source)
        features = {block for rule in rules for block in rule.features}
        layers = [
            layer for layer in store.layers if layer.kind != "feature" and any(rule.wants(layer) for rule in rules)
        ]
        layers += [layer for layer in store.layers if layer.kind == "feature" and layer.block_id in features]
        if not features <= {layer.block_id for layer in layers if layer.kind == "feature"}:
            return None
        return store.at(index, layers)

    def blend(self, x: Tensor, index: int, state: Tensor) -> Tensor:
        """x at a step of the trajectory, with `state` outside the blend's mask: exactly x at 1, exactly it at 0."""
        blend = self.branch.blend
        if not blend.applies(index / self.branch.trajectory.steps) or (blend.columns is not None and not self.maps):
            return x
        source, target = (sum(maps) for maps in zip(*self.maps.values(), strict=True)) if self.maps else (None, None)
        mask = blend.mask(source, target, tuple(x.shape[2:])).to(x)
        return torch.where(mask == 1, x, state + mask * (x - state))


@dataclass
class _Call:
    """One model call. Chunks are known by their cond index; each is an equal share of the rows of a batch."""

    rules: list[Rule]
    index: int  # of the trajectory's state
    state: Tensor  # [1 or b, c, h, w]
    source: int | None  # None where the store stands in for it
    target: int
    present: list[int]  # the conditionings that run at all
    tokens: tuple[int, int]  # of the source's and of the target's prompt, before the host tiles them
    word_maps: WordMaps | None
    kept: dict[Layer, Inputs] = field(default_factory=dict)  # of the source, from the store or from its own row

    def attention(self, kind: str, rows: Inputs, extra_options: dict) -> Inputs:
        """The rows of all chunks of a UNet call, the target's replaced by what the edits let it read.

        An attention of several terms is run as so many rows, the further ones behind all others; `leave` joins them.
        """
        rule = self.rule(layer := layer_of(kind, extra_options))
        if rule is None:
            return rows
        chunks = extra_options[CHUNKS]
        supplied = self.chunk(rows, chunks, self.source, kind) if self.source in chunks else self.kept[layer]
        if self.source in chunks and self.awaited(rule, chunks):
            self.kept[layer] = supplied
        reads: dict[int, tuple[Read, ...]] = {}
        for index in self.readers(rule, chunks):
            own = self.chunk(rows, chunks, index, kind)
            source = Inputs(*(t.to(own.query).expand(len(own.query), -1, -1) for t in supplied))
            reads[index] = rule.read(layer, source, own)
        further = [index for index, terms in reads.items() for _ in terms[1:]]
        extra_options[READS] = reads
        extra_options[CHUNKS] = [*chunks, *[TERM] * len(further)]
        extra_options["cond_or_uncond"] = [*extra_options["cond_or_uncond"], *further]
        places = {index: _slice(rows.query, chunks, index) for index in reads}
        return _with_rows(
            rows, places, {index: [_scaled(t, len(terms)) for t in terms] for index, terms in reads.items()}
        )

    def rule(self, layer: Layer) -> Rule | None:
        """The one edit that replaces this layer, if any."""
        rules = [rule for rule in self.rules if rule.wants(layer)]
        if len(rules) > 1:
            raise ValueError(
                f"{rules[0].node} and {rules[1].node} on this MODEL both replace the {layer.kind}-attention of "
                f"{layer.block} block {layer.number}: narrow the schedule or the layers of one of them."
            )
        return rules[0] if rules else None

    def readers(self, rule: Rule, chunks: Iterable[int]) -> list[int]:
        return [index for index in chunks if index == self.target or (rule.everyone and index != self.source)]

    def awaited(self, rule: Rule, chunks: list[int]) -> bool:
        """Whether a chunk that reads from the source runs in a later UNet call than these."""
        return any(index not in chunks for index in self.readers(rule, self.present))

    def leave(self, rows: Tensor, extra_options: dict) -> Tensor:
        """The layer's output [rows, positions, channels], the terms of each attention joined.

        The output is affine in the attention: the mean over terms scaled by their number is the output of their sum.
        """
        reads = extra_options.pop(READS, {})
        further = sum(len(terms) - 1 for terms in reads.values())
        if not further:
            return rows
        chunks = extra_options[CHUNKS][:-further]
        others = iter(rows.chunk(len(chunks) + further)[-further:])
        rows = rows[: -further * (len(rows) // (len(chunks) + further))].clone()
        for index, (first, *rest) in reads.items():
            where = _slice(rows, chunks, index)
            joined = rows[where] * _share(first, len(rest) + 1)
            for term in rest:
                joined = joined + next(others) * _share(term, len(rest) + 1)
            rows[where] = joined
        extra_options[CHUNKS] = chunks
        extra_options["cond_or_uncond"] = extra_options["cond_or_uncond"][:-further]
        return rows

    def feature(self, block: Block, features: Tensor, chunks: list[int]) -> Tensor:
        """Residual features of all chunks [rows, channels, h, w], the target's replaced by the source's."""
        (rule,) = (rule for rule in self.rules if block in rule.features)
        layer = Layer("feature", *block, 0, *features.shape[2:])
        if self.source in chunks:
            supplied = features[_slice(features, chunks, self.source)]
            if self.awaited(rule, chunks):
                self.kept[layer] = Inputs(supplied, supplied, supplied)
        else:
            supplied = self.kept[layer].query.to(features)
        features = features.clone()
        for index in self.readers(rule, chunks):
            features[_slice(features, chunks, index)] = supplied
        return features

    def measure(self, query: Tensor, key: Tensor, extra_options: dict) -> None:
        """Adds one layer's word maps. The target's are those of its edited map, the sum of A @ carry over its terms."""
        layer = layer_of("cross", extra_options)
        if not self.word_maps.measures(layer):
            return
        check_positions_kept(query.shape[1], layer.positions)
        chunks, heads = extra_options[CHUNKS], extra_options["n_heads"]
        of_source, of_target = self.word_maps.columns
        size = len(query) // len(chunks)

        def maps(at: int, tokens: int) -> Tensor:
            rows = slice(at * size, (at + 1) * size)
            check_prompt_kept(key.shape[1], tokens)
            return token_maps(query[rows], key[rows], heads, tokens)

        if self.source in chunks:
            self.word_maps.add("source", maps(chunks.index(self.source), self.tokens[0]) @ of_source)
        if self.target in chunks:
            reads = extra_options.get(READS, {}).get(self.target, (None,))
            further = [i for i, chunk in enumerate(chunks) if chunk == TERM]
            measured = 0
            for at, read in zip([chunks.index(self.target), *further], reads, strict=True):
                tokens = self.tokens[1] if read is None else read.inputs.key.shape[1]
                columns = of_target if read is None or read.carry is None else read.carry.to(of_target) @ of_target
                measured = measured + maps(at, tokens) @ columns
            self.word_maps.add("target", measured)

    def chunk(self, rows: Inputs, chunks: list[int], index: int, kind: str) -> Inputs:
        """One chunk's inputs, its tokens folded back to those of its own prompt."""
        inputs = Inputs(*(t[_slice(t, chunks, index)] for t in rows))
        if kind == "self":
            return inputs
        tokens = self.tokens[0 if index == self.source else 1]
        check_prompt_kept(inputs.key.shape[1], tokens)
        return Inputs(inputs.query, inputs.key[:, :tokens], inputs.value[:, :tokens])


def _outer_sample(
    executor, noise: Tensor, latent_image: Tensor, sampler: Sampler, sigmas: Tensor, denoise_mask, *args, **kwargs
):
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]  # the host's copy for this run alone
    branch = options[KEY]
    check_run(branch.trajectory, guider, noise, sampler, sigmas, denoise_mask)
    positive = guider.conds["positive"][0]["cross_attn"]
    for part in (*branch.edits, branch.blend):
        if part is not None:
            part.check(positive, len(noise))
    if branch.blend is not None:
        check_in_place(sampler)
    ((embedding, own),) = branch.trajectory.conditioning
    guider.conds[KEY] = convert_cond([[embedding.to(positive), own]])
    run = options[RUN] = _Run(branch, guider)
    try:
        result = executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
        end = branch.trajectory.index(float(sigmas[-1]))
        if branch.blend is None or end is None:
            return result
        state = guider.model_patcher.model.process_latent_out(branch.trajectory.states[end])
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
    call = run and run.call(conds, x_in, timestep)
    if not call:
        return executor(model, conds, x_in, timestep, model_options)
    options = with_enter({**options, CALL: call}, call.attention, call.leave)
    if call.word_maps is not None:
        options = with_measure(options, call.measure, model.diffusion_model)
    model_options = {**model_options, "transformer_options": options}
    joined = conds
    if call.source is not None:
        source = run.source
        if len(call.state) == len(x_in) and _one_call(source, conds[call.target][0], x_in, timestep):
            joined = [*conds, [source]]
        else:
            # One row serves a batch of targets. Or the host would run the target before the source, or compute the
            # source's ControlNet from the target's latent.
            alone = [None] * len(conds) + [[source]]
            executor(model, alone, call.state, timestep[: len(call.state)], model_options)
    results = executor(model, joined, x_in, timestep, model_options)[: len(conds)]
    if call.word_maps is not None:
        run.maps[call.index] = call.word_maps.means()
    return results


def _apply_model(executor, x: Tensor, t: Tensor, c_concat, c_crossattn, control, transformer_options: dict, **kwargs):
    call = transformer_options.get(CALL)
    if not call:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    chunks, size = transformer_options["cond_or_uncond"], len(x)
    # Other packs index pairs by these numbers: to them the source is one more row of the target's kind, after it.
    order = sorted(range(len(chunks)), key=lambda at: chunks[at] == call.source)
    chunks = [chunks[at] for at in order]
    seen = [call.target if index == call.source else index for index in chunks]
    transformer_options = {**transformer_options, CHUNKS: chunks, "cond_or_uncond": seen}
    if "uuids" in transformer_options:
        transformer_options["uuids"] = [transformer_options["uuids"][at] for at in order]

    def ordered(value, order: list[int] = order):
        rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == size
        return torch.cat([value.chunk(len(order))[at] for at in order]) if rows else value

    x, t, c_concat, c_crossattn = (ordered(value) for value in (x, t, c_concat, c_crossattn))
    if call.source in chunks:
        where = _slice(x, chunks, call.source)
        check_part(x[where], call.state)
        x[where] = call.state
    kwargs = {name: ordered(value) for name, value in kwargs.items()}
    result = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    return ordered(result, [order.index(at) for at in range(len(order))])


def _diffusion_model(executor, x: Tensor, timesteps: Tensor, context, y, control, transformer_options: dict, **kwargs):
    call = transformer_options.get(CALL)
    blocks = {block for rule in call.rules for block in rule.features} if call else ()

    def inject(block: Block, features: Tensor) -> Tensor:
        return call.feature(block, features, transformer_options[CHUNKS])

    with residual_hooks(executor.class_obj, blocks, inject):
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)


def _one_call(source: dict, target: dict, x: Tensor, timestep: Tensor) -> bool:
    """Whether the host can run source and target in one call, or else split them with the source first."""
    mine, other = get_area_and_mult(source, x, timestep), get_area_and_mult(target, x, timestep)
    return source.get("control") is None and mine.hooks == other.hooks and can_concat_cond(mine, other)


def _slice(tensor: Tensor, chunks: list[int], index: int) -> slice:
    size = len(tensor) // len(chunks)
    at = chunks.index(index)
    return slice(at * size, (at + 1) * size)


def _with_rows(rows: Inputs, places: dict[int, slice], terms: dict[int, list[Inputs]]) -> Inputs:
    """`rows` with each chunk's first term in its place, and the further terms behind all rows, in order.

    Token counts that differ are tiled, which leaves attention unchanged.
    """
    placed = [term for chunk in terms.values() for term in chunk]
    tokens = math.lcm(rows.key.shape[1], *(term.key.shape[1] for term in placed))

    def joined(name: str, length: int) -> Tensor:
        def tiled(inputs: Inputs) -> Tensor:
            tensor = getattr(inputs, name)
            return tensor.repeat(1, length // tensor.shape[1], 1)

        result = tiled(rows)  # a copy: the host shares these tensors between arguments
        for index, (first, *_) in terms.items():
            result[places[index]] = tiled(first)
        further = [tiled(term) for _, *rest in terms.values() for term in rest]
        return torch.cat([result, *further]) if further else result

    return Inputs(joined("query", rows.query.shape[1]), joined("key", tokens), joined("value", tokens))


def _scaled(term: Read, terms: int) -> Inputs:
    """The inputs of one of several terms, the value scaled where they add up: `leave` takes their mean."""
    query, key, value = term.inputs
    return Inputs(query, key, value * terms if terms > 1 and term.weight is None else value)


def _share(term: Read, terms: int) -> Tensor | float:
    return 1 / terms if term.weight is None else term.weight
