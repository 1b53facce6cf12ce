"""The node that edits by Prompt-to-Prompt."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention.alignment import same_prompt
from ..attention.p2p import Window, WordSwap
from ..host.source import attach
from . import sockets


class P2PAttentionController(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def fraction(name: str, default: float, tooltip: str, advanced: bool = False) -> io.Float.Input:
            return io.Float.Input(
                name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip, advanced=advanced
            )

        return io.Schema(
            node_id="PalimpsestP2PAttentionController",
            display_name="P2P Attention Controller",
            category="Palimpsest/edit",
            description=(
                "Prompt-to-Prompt word swap with Direct Inversion: while the target is sampled, its attention follows "
                "the source image's, so that what the prompts share stays in place. Sample the returned MODEL with "
                "KSampler Advanced or SamplerCustom, from the inverted noise, with Prompt Edit's target as positive."
            ),
            search_aliases=[
                "p2p",
                "prompt2prompt",
                "prompt to prompt",
                "word swap",
                "direct inversion",
                "cross attention control",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that made the trajectory; it may carry other packs' patches."
                ),
                sockets.Trajectory.Input(
                    "trajectory", tooltip="The source image, from DDIM Inversion or Record Trajectory."
                ),
                sockets.PromptEdit.Input("prompt_edit", tooltip="Which words change, from Prompt Edit."),
                fraction(
                    "cross_replace",
                    0.8,
                    "Until where in the run words look where the source's words looked. Higher keeps more of the "
                    "layout; lower gives the new words more freedom. Paper: 0.8.",
                ),
                fraction(
                    "self_replace",
                    0.4,
                    "Until where in the run the image's own structure is copied from the source. Higher keeps shapes; "
                    "lower lets them change. Paper: 0.4.",
                ),
                fraction("cross_replace_start", 0.0, "Where in the run cross_replace begins.", advanced=True),
                fraction("self_replace_start", 0.0, "Where in the run self_replace begins.", advanced=True),
                io.Int.Input(
                    "self_max_side",
                    default=32,
                    min=1,
                    max=1024,
                    advanced=True,
                    tooltip=(
                        "Structure is copied only in attention layers of at most this many positions a side. The "
                        "papers use 16 or 32 at 512 pixels; use 64 for SDXL at 1024."
                    ),
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model whose samples are the edited image.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        trajectory,
        prompt_edit,
        cross_replace,
        self_replace,
        cross_replace_start,
        self_replace_start,
        self_max_side,
    ) -> io.NodeOutput:
        source, target = prompt_edit.embeddings
        if not same_prompt(trajectory.conditioning[0][0], source):
            raise ValueError(
                "The trajectory was made with another source prompt than this Prompt Edit's: connect Prompt Edit's "
                "source output to the node that made the trajectory."
            )
        swap = WordSwap(
            prompt_edit.mapper,
            target,
            Window(cross_replace_start, cross_replace),
            Window(self_replace_start, self_replace),
            self_max_side**2,
        )
        return io.NodeOutput(attach(model, trajectory, swap))
