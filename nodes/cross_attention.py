"""The node that guides the latent by cross-attention maps."""

from __future__ import annotations

from comfy_api.latest import io

from ..guidance.cross_attention import CrossAttentionGuidance
from ..host.branch.guide import attach_guide
from . import sockets
from .widgets import fraction

ONE, TWO = "one (paper)", "two (authors' code)"


class CrossAttentionGuidanceNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestCrossAttentionGuidance",
            display_name="Cross Attention Guidance",
            category="Palimpsest/guide",
            description=(
                "pix2pix-zero: keeps the source image's layout by a gradient. Before every step the latent is moved so "
                "that the new prompt attends to the same places as the source prompt does in the source image."
            ),
            search_aliases=["pix2pix-zero", "pix2pix zero", "attention guidance", "keep structure", "xa guidance"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that made the trajectory; other packs' patches may be on it."
                ),
                sockets.Trajectory.Input("trajectory", tooltip="The source image."),
                io.Float.Input(
                    "amount",
                    default=0.1,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip=(
                        "How far each gradient moves the latent. Higher keeps more layout, far too high spoils the "
                        "picture. Paper: 0.1 for real images at 512 pixels; small images need more."
                    ),
                ),
                fraction("end", 1.0, "Until where in the run the latent is guided. The paper guides every step."),
                io.Int.Input(
                    "max_side",
                    default=64,
                    min=1,
                    max=1024,
                    advanced=True,
                    tooltip="The largest layers that count, in positions a side. 64: all at 512 pixels, as the paper.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=True,
                    advanced=True,
                    tooltip="Compute each block twice instead of keeping it: slower, for a fraction of the memory.",
                ),
                io.Combo.Input(
                    "latents",
                    options=[ONE, TWO],
                    default=ONE,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "One latent, moved by the target's attention, as the paper writes; or two, as in its authors' "
                        "code: the sampler's follows the negative prompt's attention, and the target has its own."
                    ),
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model whose samples keep the source's layout.")],
        )

    @classmethod
    def execute(cls, model, trajectory, amount, end, max_side, checkpointing, latents=ONE) -> io.NodeOutput:
        if amount == 0:
            return io.NodeOutput(model)
        guide = CrossAttentionGuidance(amount, end, max_side, latents == TWO)
        return io.NodeOutput(attach_guide(model, trajectory, guide, checkpointing))
