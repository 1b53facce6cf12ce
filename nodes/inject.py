"""Nodes that edit by injecting the source's features and attention: Plug-and-Play and MasaCtrl."""

from __future__ import annotations

from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy_api.latest import io
from torch import Tensor

from ..attention.masactrl import MasaCtrl
from ..attention.pnp import PRESETS, READS, PlugAndPlay
from ..host.branch.blocks import attention_blocks as blocks_of_attention
from ..host.branch.blocks import last_layers, layers_in, layout_blocks, parse_blocks
from ..host.branch.source import attach
from ..host.files.trajectory import Trajectory
from ..host.run.model import is_unet
from ..host.run.refusals import check_foreground, check_readable, check_unet
from ..host.unet.tree import blocks_with
from . import sockets
from .widgets import drawn, fraction

CUSTOM = "custom"


class PnPFeatureInjector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def blocks(name: str, tooltip: str) -> io.String.Input:
            return io.String.Input(name, default="", tooltip=tooltip, advanced=True)

        return io.Schema(
            node_id="PalimpsestPnPFeatureInjector",
            display_name="PnP Feature Injector",
            category="Palimpsest/edit",
            description=(
                "Plug-and-Play: while the target is sampled, features and self-attention of the source image take the "
                "place of its own in the decoder, so that the new prompt re-draws the same layout. In Flux, SD3 and "
                "other flow models it is the attention alone, in every block. Sample the returned MODEL from the "
                "inverted noise with any prompt."
            ),
            search_aliases=[
                "plug and play",
                "pnp",
                "feature injection",
                "image to image translation",
                "structure",
                "flux attention",
                "mm-dit",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that made the trajectory; other packs' patches may be on it."
                ),
                sockets.Trajectory.Input(
                    "trajectory", tooltip="The source image; the paper inverts it with an empty prompt."
                ),
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *PRESETS],
                    default=CUSTOM,
                    tooltip=(
                        "Settings of the literature, in place of the two fractions below: the paper's code injects "
                        "features in 41 of 50 steps and attention in 26, the authors' diffusers version in 40 and 25."
                    ),
                ),
                fraction(
                    "tau_f",
                    0.8,
                    "Until where in the run features are the source's. Higher keeps more structure. Flow models have "
                    "none.",
                ),
                fraction(
                    "tau_a", 0.5, "Until where in the run self-attention is the source's. Higher keeps more layout."
                ),
                blocks(
                    "feature_blocks",
                    "Where features are injected, such as output 4. Empty: the paper's block, or its like here.",
                ),
                blocks(
                    "attention_blocks",
                    "Where self-attention is injected, such as output 4-11, or double 0-18, single 0-37 in Flux. "
                    "Empty: the paper's, or their like.",
                ),
                sockets.AttentionStore.Input(
                    "attention_store",
                    optional=True,
                    tooltip="From Record Attention with feature_replace: two rows a step instead of three.",
                ),
                io.Combo.Input(
                    "reads",
                    options=[*READS],
                    default=next(iter(READS)),
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "What of the attention is the source's: queries and keys keep the layout, as in the paper; "
                        "values keep the looks, as RF-Solver-Edit does in the last blocks of Flux; or keys and values."
                    ),
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model whose samples keep the source's structure.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        trajectory,
        preset,
        tau_f,
        tau_a,
        feature_blocks,
        attention_blocks,
        attention_store=None,
        reads="queries, keys",
    ) -> io.NodeOutput:
        check_readable(model, PlugAndPlay.node)
        network = model.model.diffusion_model
        if feature_blocks.strip():
            check_unet(model, "feature_blocks of PnP Feature Injector")
        residual = blocks_with(network, ResBlock) if is_unet(model) else []
        features = parse_blocks(feature_blocks, residual, "feature_blocks of PnP Feature Injector")
        attention = parse_blocks(
            attention_blocks, blocks_of_attention(network), "attention_blocks of PnP Feature Injector"
        )
        layout = layout_blocks(network)
        tau_f, tau_a = PRESETS.get(preset, (tau_f, tau_a))
        features = features or tuple(layout[:1] if residual else ())
        edit = PlugAndPlay(features, attention or tuple(layout), tau_f, tau_a, READS[reads])
        return io.NodeOutput(attach(model, trajectory, edit, attention_store))


class MasaCtrlNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestMasaCtrl",
            display_name="MasaCtrl",
            category="Palimpsest/edit",
            description=(
                "Mutual self-attention: the target takes its content from the source image, while its prompt decides "
                "pose and layout. For changes that Prompt-to-Prompt cannot make because it keeps the layout."
            ),
            search_aliases=[
                "masactrl",
                "mutual self attention",
                "non-rigid edit",
                "consistent character",
                "pose edit",
                "stable flow",
                "kv injection",
                "kv-edit",
                "inpaint",
                "keep background",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that made the trajectory; other packs' patches may be on it."
                ),
                sockets.Trajectory.Input(
                    "trajectory", tooltip="The source image; the paper inverts it with an empty prompt."
                ),
                fraction(
                    "start",
                    0.08,
                    "From where in the run on. Later gives the new layout more time to form. Paper: step 4 of 50.",
                ),
                io.Int.Input(
                    "first_layer",
                    default=-1,
                    min=-1,
                    max=1000,
                    tooltip=(
                        "From which attention layer on, counted from 0 through the whole model. Paper: 10 of 16 for "
                        "SD1.5, 44 to 64 of 70 for SDXL. -1: as far into this model."
                    ),
                ),
                io.Boolean.Input(
                    "union",
                    default=False,
                    advanced=True,
                    tooltip="Attend to the target's own positions as well, not to the source's alone.",
                ),
                io.Mask.Input("source_mask", optional=True, tooltip="The foreground of the source image; any size."),
                io.Mask.Input("target_mask", optional=True, tooltip="Where the foreground is to be in the result."),
                sockets.AttentionStore.Input(
                    "attention_store", optional=True, tooltip="From Record Attention: two rows a step instead of three."
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Which blocks take their content from the source, in place of first_layer: double 0-1, single "
                        "34-37 in Flux, block 3 in SD3, output 5 in a UNet. vital: Stable Flow's choice for Flux.1."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Where to edit, in any size (KV-Edit): inside it the content is the target's own, outside the "
                        "source's. Local Blend with the same mask keeps the rest exactly."
                    ),
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model whose samples take their content from the source.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        trajectory,
        start,
        first_layer,
        union,
        source_mask=None,
        target_mask=None,
        attention_store=None,
        blocks="",
        mask=None,
    ) -> io.NodeOutput:
        check_readable(model, MasaCtrl.node)
        masks = None
        if source_mask is not None or target_mask is not None:
            check_foreground(model)
            masks = _foreground(source_mask, target_mask, trajectory, union)
        if mask is not None and (union or masks is not None):
            raise ValueError(
                "MasaCtrl's mask says by itself where the target reads the source and where its own: "
                + ("switch union off." if union else "disconnect source_mask and target_mask, or mask.")
            )
        network = model.model.diffusion_model
        if blocks.strip():
            layers = layers_in(network, blocks, "blocks of MasaCtrl")
        else:
            layers = last_layers(network, first_layer)
        frames = trajectory.states.shape[3] if trajectory.states.ndim == 6 else 1
        edit = MasaCtrl(layers, start, union, masks, None if mask is None else drawn(mask), frames)
        return io.NodeOutput(attach(model, trajectory, edit, attention_store))


def _foreground(
    source_mask: Tensor | None, target_mask: Tensor | None, trajectory: Trajectory, union: bool
) -> tuple[Tensor, Tensor]:
    if source_mask is None or target_mask is None:
        missing = "source_mask" if source_mask is None else "target_mask"
        raise ValueError(f"MasaCtrl needs both masks or neither: connect {missing} as well.")
    if union:
        raise ValueError("MasaCtrl keeps foreground and background apart by masks, which union mixes: switch it off.")
    counts = len(source_mask), len(target_mask), trajectory.states.shape[1]
    if counts != (1, 1, 1):
        raise ValueError(
            f"MasaCtrl got {counts[0]} source masks, {counts[1]} target masks and {counts[2]} images: with masks it "
            "edits one image at a time."
        )
    return drawn(source_mask[0]), drawn(target_mask[0])
