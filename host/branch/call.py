"""What happens inside one model call: the target's rows read from the source's in every layer that an edit wants."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from comfy.model_base import BaseModel
from comfy.samplers import calc_cond_batch
from torch import Tensor, nn

from ..dit.architectures import architecture_of, padded, turned
from ..dit.attention import Attend as JointAttend
from ..dit.attention import Joint, Parts
from ..layer import Block, Inputs, Layer, Read, Rule, fields_read
from ..run.refusals import (
    check_divided,
    check_positions_kept,
    check_prompt_kept,
    check_source_ran,
    check_stored,
)
from ..unet.patches import Attend, host_attention, layer_of
from .joint import JointRows, edited_attention, image_attention, joint_maps
from .maps import WordMaps, layout_map, token_maps

KEY = "palimpsest"
CHUNKS, READS = f"{KEY}.chunks", f"{KEY}.reads"
TERM = -1  # stands for a further term of the target's attention among the cond indices of a call
POSITIVE, NEGATIVE = 0, 1  # cond indices in a guider's call, by which other packs tell the two


def place(conds: Sequence[Sequence[dict] | None], sought: Iterable[dict]) -> int | None:
    """Where in the conditionings of a call one of those `sought` stands, if any does."""
    known = {cond["uuid"] for cond in sought}
    return next((i for i, cond in enumerate(conds) if cond and cond[0]["uuid"] in known), None)


def estimate(base: BaseModel, at: int, cond: dict, x: Tensor, timestep: Tensor, model_options: dict) -> Tensor:
    """The denoised estimate of x by a processed conditioning that runs alone, at the cond index of a guider's call."""
    conds = [[cond] if index == at else None for index in (POSITIVE, NEGATIVE)]
    return calc_cond_batch(base, conds, x, timestep, model_options)[at]


@dataclass
class Call:
    """One model call. Its chunks are equal shares of the rows of a batch, known by their place among the cond indices
    of a UNet call; several may be of one index.
    """

    rules: list[Rule]
    index: int  # of the trajectory's state
    state: Tensor  # [1 or b, c, h, w]
    source: int | None  # None where the store stands in for it
    target: int | None  # None where only others read
    present: list[int]  # the index of every entry that runs at all
    tokens: tuple[int, int]  # of the source's and of the target's prompt, before the host tiles them
    word_maps: WordMaps | None
    beside: int | None = None  # the negative prompt at the source's state, where that guides the source's prediction
    kept: dict[Layer, Inputs] = field(default_factory=dict)  # of the source, from the store or from its own row
    before: int = 0  # the tokens before the source's image, in a flow transformer; told by a store, or its own row
    values: Tensor | None = None  # [1 or b, tokens, channels], the source's in cross-attention where not its prompt
    ran: set[int] = field(default_factory=set)  # the chunks that the UNet was run for: another node may leave them out

    def attention(self, kind: str, rows: Inputs, extra_options: dict) -> Inputs:
        """The rows of all chunks of a UNet call, the target's replaced by what the edits let it read.

        An attention of several terms is run as so many rows, the further ones behind all others; `leave` joins them.
        """
        chunks = extra_options[CHUNKS]
        self.ran.update(chunks)
        check_source_ran(self.source is None or self.source in self.ran)
        rows = self.with_values(kind, rows, chunks)
        rule = self.rule(layer := layer_of(kind, extra_options))
        if rule is None:
            return rows
        if self.source not in chunks and not self.readers(rule, chunks):
            return rows
        if self.source in chunks:
            supplied = self.chunk(rows, chunks, chunks.index(self.source), kind)
            if self.awaited(rule, chunks):
                self.kept[layer] = supplied
        else:
            check_stored(layer, self.kept)
            supplied = self.kept[layer]
        reads: dict[int, tuple[Read, ...]] = {}
        for at in self.readers(rule, chunks):
            own = self.chunk(rows, chunks, at, kind)
            source = Inputs(*(t.to(own.query).expand(len(own.query), -1, -1) for t in supplied))
            reads[at] = rule.read(layer, source, own)
        further = [at for at, terms in reads.items() for _ in terms[1:]]
        seen = extra_options["cond_or_uncond"]
        extra_options[READS] = reads
        extra_options[CHUNKS] = [*chunks, *[TERM] * len(further)]
        extra_options["cond_or_uncond"] = [*seen, *[seen[at] for at in further]]
        scaled = {at: [_scaled(term, len(terms)) for term in terms] for at, terms in reads.items()}
        return _with_rows(rows, len(chunks), scaled)

    def joint(
        self,
        model: nn.Module,
        joint: Joint,
        attend: JointAttend,
        tensors: tuple[Tensor, Tensor, Tensor],
        extra_options: dict,
    ) -> Tensor:
        """The attention of the image's tokens in a flow transformer, the target's replaced by what the edits let them
        read. The text's tokens meet the image's new keys and values, and read as ever but for that.
        """
        chunks, layer = extra_options[CHUNKS], joint.layer
        crossing = layer._replace(kind="cross")
        self.ran.update(chunks)
        check_source_ran(self.source is None or self.source in self.ran)
        rules = {kind: rule for kind in (layer, crossing) if (rule := self.rule(kind)) is not None}
        readers = {kind: self.readers(rules[kind], chunks) if kind in rules else [] for kind in (layer, crossing)}
        measured = {self.source, self.target} & {*chunks} if self.word_maps is not None else set()
        if not any(readers.values()) and not measured and not (rules and self.source in chunks):
            return attend(*tensors)
        rows = JointRows(joint, attend, tensors, len(chunks))

        def parts(at: int) -> list[Parts]:
            tokens = self.tokens[0 if chunks[at] == self.source else 1]
            return rows.parts(at, tokens, padded(model, tokens))

        supplied = {kind: _like(self.kept[kind], tensors[0]) for kind in (layer, crossing) if kind in self.kept}
        if self.source in chunks:
            at = chunks.index(self.source)
            supplied = {layer: rows.image(at)}
            if crossing in rules:
                supplied[crossing] = Inputs(None, *(part.words for part in parts(at)))
            self.before = joint.where.start
            if any(self.awaited(rule, chunks) for rule in rules.values()):
                self.kept |= {kind: _copied(given, fields_read(kind, self.rules)) for kind, given in supplied.items()}
        if architecture_of(model).turned and (by := joint.where.start - self.before):
            supplied = {kind: _turned(model, supplied[kind], by) for kind in (layer, crossing) if kind in supplied}
        images = [rows.image(at) for at in range(len(chunks))]
        sources = {at: _expanded(supplied[layer], len(images[at].query)) for at in {*chain(*readers.values())}}
        changed: dict[int, Inputs] = {}
        for at in readers[layer]:
            (read,) = rules[layer].read(layer, sources[at], images[at])
            changed[at] = read.inputs
        result = rows.attended(images, changed)

        def worded(at: int) -> tuple[Parts, Callable[[Parts], Tensor]]:
            """The values of a chunk, and what its image's tokens get of such values."""
            (keys, values), (query, key, value) = parts(at), changed.get(at, images[at])
            given, values = (joint, attend, query, keys._replace(image=key)), values._replace(image=value)
            if at not in readers[crossing]:
                return values, partial(image_attention, *given)
            source = _expanded(supplied[crossing], len(query))._replace(query=sources[at].query)
            return values, partial(
                edited_attention, *given, source=source, read=partial(rules[crossing].read, crossing)
            )

        for at in readers[crossing]:
            values, attention = worded(at)
            result[slice_of(result, chunks, at), joint.where] = attention(values)
        for side, index in (("source", self.source), ("target", self.target)):
            if index in measured:
                values, attention = worded(chunks.index(index))
                columns = self.word_maps.columns[side == "target"][:, : values.words.shape[1]]
                self.word_maps.add(side, joint_maps(joint, values, columns, attention))
        return result

    def attend(self, inner: Attend, query: Tensor, key: Tensor, value: Tensor, extra_options: dict) -> Tensor:
        """The attention of all rows of a self-attention layer; who reads in parts has a call of its own for each."""
        self.measure_layout(query, key, extra_options)
        reads = extra_options.get(READS, {})
        parts = next((first.parts for first, *_ in reads.values()), ())
        if not parts:
            return inner(query, key, value, extra_options)
        layer = layer_of("self", extra_options)
        check_positions_kept(query.shape[1], layer.positions)
        chunks, seen = extra_options[CHUNKS], extra_options["cond_or_uncond"]
        rows = [*zip(*(tensor.chunk(len(chunks)) for tensor in (query, key, value)), strict=True)]

        def attention(places: list[int], keys: Tensor | slice = slice(None)) -> Tensor:
            query, key, value = (torch.cat(tensors) for tensors in zip(*(rows[at] for at in places), strict=True))
            options = {**extra_options, "cond_or_uncond": [seen[at] for at in places]}
            result = inner(query, key[:, keys], value[:, keys], options)
            check_divided(result, query, layer)
            return result

        readers = [*reads]
        joined = sum(weight * attention(readers, keys) for keys, weight in parts)
        # Another pack's attention is shown the whole layer too, and last: some remember what they saw.
        others = [at for at in range(len(chunks)) if at not in readers or inner is not host_attention]
        results = dict(zip(others, attention(others).chunk(len(others)), strict=True)) if others else {}
        results |= zip(readers, joined.chunk(len(readers)), strict=True)
        return torch.cat([results[at] for at in range(len(chunks))])

    @property
    def reads(self) -> bool:
        """Whether anything inside the network is read or measured."""
        return bool(self.rules) or self.word_maps is not None

    @property
    def at_source(self) -> set[int | None]:
        """The indices of what runs at the source's state."""
        return {index for index in (self.source, self.beside) if index is not None}

    def rule(self, layer: Layer) -> Rule | None:
        """The one edit that replaces this layer, if any."""
        rules = [rule for rule in self.rules if rule.wants(layer)]
        if len(rules) > 1:
            raise ValueError(
                f"{rules[0].node} and {rules[1].node} on this MODEL both replace the {layer.kind}-attention of "
                f"{layer.block} block {layer.number}: narrow the schedule or the layers of one of them."
            )
        return rules[0] if rules else None

    def readers(self, rule: Rule, chunks: Sequence[int]) -> list[int]:
        """The places of the chunks that read from the source."""
        return [
            at
            for at, index in enumerate(chunks)
            if index == self.target or (rule.everyone and index not in self.at_source)
        ]

    def awaited(self, rule: Rule, chunks: list[int]) -> bool:
        """Whether a chunk that reads from the source runs in a later UNet call than these."""
        return len(self.readers(rule, self.present)) > len(self.readers(rule, chunks))

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
        for at, (_, *rest) in reads.items():
            where = slice_of(rows, chunks, at)
            rows[where] = sum((next(others) for _ in rest), rows[where]) / (len(rest) + 1)
        extra_options[CHUNKS] = chunks
        extra_options["cond_or_uncond"] = extra_options["cond_or_uncond"][:-further]
        return rows

    def feature(self, block: Block, features: Tensor, chunks: list[int]) -> Tensor:
        """Residual features of all chunks [rows, channels, h, w], the target's replaced by the source's."""
        (rule,) = (rule for rule in self.rules if block in rule.features)
        layer = Layer("feature", *block, 0, *features.shape[2:])
        if self.source in chunks:
            supplied = features[slice_of(features, chunks, chunks.index(self.source))]
            if self.awaited(rule, chunks):
                self.kept[layer] = Inputs(supplied, supplied, supplied)
        else:
            check_stored(layer, self.kept)
            supplied = self.kept[layer].query.to(features)
        features = features.clone()
        for at in self.readers(rule, chunks):
            features[slice_of(features, chunks, at)] = supplied
        return features

    def measure(self, query: Tensor, key: Tensor, extra_options: dict) -> None:
        """Adds one layer's word maps. The target's are those of its edited map, the sum of A @ carry over its terms."""
        layer = layer_of("cross", extra_options)
        if not self.word_maps.measures(layer):
            return
        check_positions_kept(query.shape[1], layer.positions)
        chunks, heads = extra_options[CHUNKS], extra_options["n_heads"]
        of_source, of_target = self.word_maps.columns

        def maps(at: int, tokens: int) -> Tensor:
            rows = slice_of(query, chunks, at)
            check_prompt_kept(key.shape[1], tokens)
            return token_maps(query[rows], key[rows], heads, tokens)

        if self.source in chunks:
            self.word_maps.add("source", maps(chunks.index(self.source), self.tokens[0]) @ of_source)
        if self.target in chunks:
            target = chunks.index(self.target)
            reads = extra_options.get(READS, {}).get(target, (None,))
            further = [i for i, chunk in enumerate(chunks) if chunk == TERM]
            measured = 0
            for at, read in zip([target, *further], reads, strict=True):
                tokens = self.tokens[1] if read is None else read.inputs.key.shape[1]
                columns = of_target if read is None or read.carry is None else read.carry.to(of_target) @ of_target
                measured = measured + maps(at, tokens) @ columns
            self.word_maps.add("target", measured)

    def measure_layout(self, query: Tensor, key: Tensor, extra_options: dict) -> None:
        """Adds one layer's self-attention maps, the target's where its queries and keys are of the same image."""
        layer = layer_of("self", extra_options)
        if self.word_maps is None or not self.word_maps.measures(layer):
            return
        check_positions_kept(query.shape[1], layer.positions)
        chunks, rule = extra_options[CHUNKS], self.rule(layer)
        crosses = rule is not None and ("query" in rule.reads) != ("key" in rule.reads)
        for side, index in (("source", self.source), ("target", self.target)):
            if index in chunks and not (side == "target" and crosses):
                rows = slice_of(query, chunks, chunks.index(index))
                own = key[rows, : layer.positions]  # tiled where another row reads the keys of both images
                self.word_maps.add(side, layout_map(query[rows], own, extra_options["n_heads"]), "self")

    def with_values(self, kind: str, rows: Inputs, chunks: list[int]) -> Inputs:
        """The rows of all chunks, in cross-attention with the source's own values in its rows."""
        if kind == "self" or self.values is None or self.source not in chunks:
            return rows
        return with_value(rows, slice_of(rows.value, chunks, chunks.index(self.source)), self.values)

    def chunk(self, rows: Inputs, chunks: list[int], at: int, kind: str) -> Inputs:
        """The inputs of the chunk at a place, its tokens folded back to those of its own prompt."""
        inputs = Inputs(*(t[slice_of(t, chunks, at)] for t in rows))
        if kind == "self":
            return inputs
        tokens = self.tokens[0 if chunks[at] == self.source else 1]
        check_prompt_kept(inputs.key.shape[1], tokens)
        return Inputs(inputs.query, inputs.key[:, :tokens], inputs.value[:, :tokens])


def with_value(rows: Inputs, where: slice, values: Tensor) -> Inputs:
    """The inputs of a cross-attention with `values` [b, tokens, channels] in some of its rows, tiled as keys are."""
    check_prompt_kept(rows.value.shape[1], values.shape[1])
    value = rows.value.clone()
    value[where] = values.to(value).repeat(1, value.shape[1] // values.shape[1], 1)
    return rows._replace(value=value)


def _expanded(inputs: Inputs, rows: int) -> Inputs:
    return Inputs(*(t if t is None else t.expand(rows, *t.shape[1:]) for t in inputs))


def _like(inputs: Inputs, tensor: Tensor) -> Inputs:
    """Inputs where the tensors of an attention are, and of their precision: a store may keep them elsewhere."""
    return Inputs(*(t if t is None else t.to(tensor) for t in inputs))


def _copied(inputs: Inputs, fields: Iterable[str]) -> Inputs:
    """Copies of some fields alone: a view would keep the whole layer's tensors until the target's call."""
    return Inputs(*(t.clone() if name in fields else None for name, t in inputs._asdict().items()))


def _turned(model: nn.Module, inputs: Inputs, by: int) -> Inputs:
    """Queries and keys of a prompt as they would be behind one of `by` more tokens."""
    query, key = (t if t is None else turned(model, t, by) for t in inputs[:2])
    return Inputs(query, key, inputs.value)


def slice_of(tensor: Tensor, chunks: list[int], at: int) -> slice:
    """The rows of the chunk at a place."""
    size = len(tensor) // len(chunks)
    return slice(at * size, (at + 1) * size)


def _with_rows(rows: Inputs, chunks: int, terms: dict[int, list[Inputs]]) -> Inputs:
    """`rows` with each chunk's first term in its place, and the further terms behind all rows, in order.

    Token counts that differ are tiled, which leaves attention unchanged. What does not change is not copied, and what
    is the same for several arguments once: the host shares these tensors between them.
    """
    own = [Inputs(*each) for each in zip(*(t.chunk(chunks) for t in rows), strict=True)]
    parts = [terms[at][0] if at in terms else own[at] for at in range(chunks)]
    parts += [term for _, *rest in terms.values() for term in rest]
    tokens = math.lcm(*(part.key.shape[1] for part in parts))
    lengths = Inputs(rows.query.shape[1], tokens, tokens)._asdict()
    made: dict[str, Tensor] = {}
    for name, length in lengths.items():
        tensors = [getattr(part, name) for part in parts]
        alike = (
            other
            for other in made
            if length == lengths[other] and all(_same(getattr(part, other), getattr(part, name)) for part in parts)
        )
        if len(parts) == chunks and all(_same(t, getattr(one, name)) for t, one in zip(tensors, own, strict=True)):
            made[name] = _tiled(getattr(rows, name), length)
        elif (other := next(alike, None)) is not None:
            made[name] = made[other]
        else:
            made[name] = torch.cat([_tiled(tensor, length) for tensor in tensors])
    return Inputs(**made)


def _tiled(tensor: Tensor, tokens: int) -> Tensor:
    return tensor if tensor.shape[1] == tokens else tensor.repeat(1, tokens // tensor.shape[1], 1)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same view of the same memory."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def _scaled(term: Read, terms: int) -> Inputs:
    """The inputs of one of several terms, the value scaled: `leave` takes their mean."""
    query, key, value = term.inputs
    return Inputs(query, key, value * terms if terms > 1 else value)
