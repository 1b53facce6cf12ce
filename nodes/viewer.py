"""The node that shows what the model sees in the source."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor
from torch.nn.functional import interpolate

from ..attention.viewer import components, self_attention
from ..host.branch.blocks import named, parse_blocks
from ..host.files.store import AttentionStore
from ..host.layer import Layer
from ..host.run.refusals import check_same_model, check_unet
from ..host.unet.tree import attention_of
from . import sockets

FEATURES, SELF_ATTENTION = "features", "self-attention"


class FeatureViewer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestFeatureViewer",
            display_name="Feature Viewer",
            category="Palimpsest/edit",
            description=(
                "Shows the three leading components of the source's features, or of its self-attention, as colours: "
                "parts of the image that the model holds to be alike look alike. A picture for each step."
            ),
            search_aliases=["pca", "principal components", "feature visualization", "plug and play features"],
            inputs=[
                io.Model.Input("model", tooltip="The model that made the store."),
                sockets.AttentionStore.Input(
                    "attention_store", tooltip="From Record Attention; for features with feature_replace above 0."
                ),
                io.Combo.Input(
                    "show",
                    options=[SELF_ATTENTION, FEATURES],
                    default=SELF_ATTENTION,
                    tooltip="Self-attention shows what looks at what, features what a residual block makes of it.",
                ),
                io.String.Input(
                    "block", default="", tooltip="A block, such as output 4. Empty: the first recorded in the decoder."
                ),
                io.Int.Input("pictures", default=4, min=1, max=1000, tooltip="How many steps, evenly chosen."),
            ],
            outputs=[io.Image.Output("components", tooltip="A picture for each step, from the noise to the image.")],
        )

    @classmethod
    def execute(cls, model, attention_store, show, block, pictures) -> io.NodeOutput:
        check_unet(model, "Feature Viewer")
        check_same_model(model, attention_store.trajectory)
        layer = _chosen(attention_store, "feature" if show == FEATURES else "self", block)
        at = attention_store.layers.index(layer)
        recorded = [step[at] for step in attention_store.inputs if step[at] is not None]
        count = min(pictures, len(recorded))
        chosen = [recorded[i * (len(recorded) - 1) // max(count - 1, 1)] for i in range(count)]
        if layer.kind == "feature":
            seen = [features.float().flatten(2).transpose(1, 2) for features in chosen]
        else:
            seen = _attention(model, layer, chosen)
        found = components(torch.cat(seen)).unflatten(1, (layer.height, layer.width)).movedim(-1, 1)
        height, width = attention_store.trajectory.states.shape[3:]
        return io.NodeOutput(interpolate(found, (8 * height, 8 * width), mode="nearest").movedim(1, -1))


def _chosen(store: AttentionStore, kind: str, block: str) -> Layer:
    """The recorded layer of a kind in the named block, or the first one of the decoder."""
    recorded = [
        layer
        for i, layer in enumerate(store.layers)
        if layer.kind == kind and any(step[i] is not None for step in store.inputs)
    ]
    if not recorded:
        needed = {"feature": "feature_replace", "self": "self_replace"}[kind]
        raise ValueError(
            f"The attention store holds no {kind} inputs to show: raise {needed} in Record Attention, or its budget."
        )
    blocks = list(dict.fromkeys(layer.block_id for layer in recorded))
    wanted = parse_blocks(block, blocks, "block of Feature Viewer")
    if len(wanted) > 1:
        raise ValueError(f"Feature Viewer shows one block, but block names {named(list(wanted))}: choose one of them.")
    decoder = [each for each in blocks if each[0] == "output"] or blocks
    return next(layer for layer in recorded if layer.block_id == (wanted or decoder)[0])


def _attention(model: ModelPatcher, layer: Layer, inputs: list[Tensor]) -> list[Tensor]:
    """The self-attention maps [b, positions, positions] of recorded inputs of one layer."""
    comfy.model_management.load_models_gpu([model])
    attention = attention_of(model.model.diffusion_model, layer)
    maps = []
    for recorded in inputs:
        rows = recorded.to(model.load_device, model.model_dtype())
        maps.append(self_attention(attention.to_q(rows), attention.to_k(rows), attention.heads).cpu())
    return maps
