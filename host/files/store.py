"""The ATTENTION_STORE: what the source's row supplies to edits, recorded once. Pure torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..layer import Inputs, Layer
from .storage import Format
from .trajectory import Trajectory, read_file, write_file

FORMAT = Format("palimpsest.attention_store/2", "attention store", "Save Attention Store")


class AttentionStore(NamedTuple):
    """A tuple of tensors, so that the host's cache can weigh it. Never changed once made.

    inputs: by step and layer, the query input of the source's row [b, positions, channels] (in self-attention also the
    key and value input), or its residual features [b, channels, h, w]; None where not recorded.
    maps: by size of layer, [n, b, h, w, tokens] fp32: at each step the source's cross-attention map, its mean over
    heads and layers; none where words cannot be told apart.
    fields: of a flow transformer, which field of `Inputs` each of the inputs is; a layer then stands in `layers` once
    for each that was seen of it. Empty for UNets.
    before: the tokens before the source's image, in a flow transformer.
    """

    trajectory: Trajectory
    layers: tuple[Layer, ...]
    inputs: tuple[tuple[Tensor | None, ...], ...]
    maps: tuple[Tensor, ...]
    fields: tuple[str, ...] = ()
    before: int = 0

    @property
    def bytes(self) -> int:
        """What the recorded inputs hold."""
        return sum(t.numel() * t.element_size() for step in self.inputs for t in step if t is not None)

    def at(self, step: int, layers: list[Layer]) -> dict[Layer, Inputs] | None:
        """What the source's row supplies to `layers` at a step; None where one of them was not recorded."""
        recorded = dict(zip(self.layers, self.inputs[step], strict=True))
        if any(recorded.get(layer) is None for layer in layers):
            return None
        context = self.trajectory.conditioning[0][0]
        kept = {}
        for layer in layers:
            query = recorded[layer]
            kept[layer] = Inputs(query, *((context, context) if layer.kind == "cross" else (query, query)))
        return kept

    def joint_at(self, step: int, wanted: dict[Layer, set[str]]) -> dict[Layer, Inputs] | None:
        """What the source's row supplies to layers of a flow transformer at a step, the `wanted` fields of each.

        None where one of them was not recorded.
        """
        recorded = dict(zip(zip(self.layers, self.fields, strict=True), self.inputs[step], strict=True))
        found = {layer: {field: recorded.get((layer, field)) for field in wanted[layer]} for layer in wanted}
        if any(tensor is None for fields in found.values() for tensor in fields.values()):
            return None
        return {layer: Inputs(None, None, None)._replace(**fields) for layer, fields in found.items()}

    def word_maps(self, step: int, columns: Tensor, size: tuple[int, int]) -> Tensor | None:
        """[b, m, h, w]: the maps of phrases given by columns [b, tokens, m]; None where none of that size are held."""
        maps = next((maps for maps in self.maps if maps.shape[2:4] == size), None)
        return None if maps is None else (maps[step].to(columns) @ columns[:, None]).movedim(-1, 1)

    def save(self, path: Path) -> None:
        """Write a safetensors file that holds the trajectory too. Raises ValueError as Trajectory.save."""
        tensors = {f"maps.{i}": maps for i, maps in enumerate(self.maps)}
        for step, inputs in enumerate(self.inputs):
            tensors |= {f"inputs.{step}.{i}": t for i, t in enumerate(inputs) if t is not None}
        layout = {"layers": self.layers, "fields": self.fields, "before": self.before}
        written = {name: json.dumps(value) for name, value in layout.items()}
        write_file(path, FORMAT, self.trajectory, tensors, written)

    @classmethod
    def load(cls, path: Path) -> AttentionStore:
        """Read what `save` wrote. Raises ValueError, naming the file, where it is damaged or something else."""
        return read_file(path, FORMAT, cls._parse)

    @classmethod
    def _parse(cls, trajectory: Trajectory, tensors: dict[str, Tensor], metadata: dict[str, str]) -> AttentionStore:
        layers = tuple(Layer(*layer) for layer in json.loads(metadata["layers"]))
        # Files of before there were flow transformers' lack both.
        fields = tuple(json.loads(metadata.get("fields", "[]")))
        before = int(metadata.get("before", 0))
        inputs = tuple(
            tuple(tensors.get(f"inputs.{step}.{i}") for i in range(len(layers))) for step in range(trajectory.steps)
        )
        maps = tuple(tensors[f"maps.{i}"] for i in range(sum(name.startswith("maps.") for name in tensors)))
        if any(len(t) != trajectory.steps for t in maps):
            raise ValueError("its maps do not fit its trajectory")
        if fields and (len(fields) != len(layers) or not {*fields} <= {*Inputs._fields}):
            raise ValueError("its fields do not fit its layers")
        return cls(trajectory, layers, inputs, maps, fields, before)
