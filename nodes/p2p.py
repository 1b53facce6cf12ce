"""The node that edits by Prompt-to-Prompt."""

from __future__ import annotations

from dataclasses import astuple

from comfy_api.latest import io

from ..attention.editing import prompt_to_prompt
from ..attention.p2p import PRESETS, Settings, Window
from . import sockets
from .widgets import check_window, fraction

CUSTOM = "custom"


class P2PAttentionController(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestP2PAttentionController",
            display_name="P2P Attention Controller",
            category="Palimpsest/edit",
            description=(
                "Prompt-to-Prompt with Direct Inversion: while the target is sampled, its attention follows the source "
                "image's, so that what the prompts share stays in place. Swaps, adds, removes and re-weighs words. "
                "Sample the returned MODEL with KSampler Advanced or SamplerCustom, from the inverted noise, with "
                "Prompt Edit's target as positive."
            ),
            search_aliases=[
                "p2p",
                "prompt2prompt",
                "prompt to prompt",
                "attention control",
                "edit image",
                "edit photo",
                "image editing",
                "replace object",
                "word swap",
                "refine",
                "reweight",
                "attention reweighting",
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
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *PRESETS],
                    default=CUSTOM,
                    tooltip=(
                        "Settings of the literature, in place of the schedules below: the paper's (0.8, 0.4, 16), the "
                        "null-text notebook's for real images (0.8, 0.5, 32), the PIE-Bench run's (refine, 0.4, 0.6, "
                        "32, new words weighed by 2), or InfEdit's (0.7, 0.7, every layer), for Virtual Inversion."
                    ),
                ),
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
                io.String.Input(
                    "reweight",
                    default="",
                    tooltip=(
                        "How strongly single words of the target act: fluffy:2, red:-1. 1 is as they are, 0 not at "
                        "all, below 0 the opposite. Acts as long as cross_replace does."
                    ),
                ),
                io.String.Input(
                    "word_schedule",
                    default="",
                    tooltip=(
                        "cross_replace for single words of the target: lion:0.4 ends at 0.4 of the run, lion:0.1-0.4 "
                        "begins at 0.1 as well. All other words keep to cross_replace."
                    ),
                    advanced=True,
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
                        "papers use 16 or 32 at 512 pixels; use 64 for SDXL at 1024. Flow models such as Flux copy it "
                        "in all layers, which are of one size."
                    ),
                ),
                sockets.AttentionStore.Input(
                    "attention_store",
                    optional=True,
                    tooltip="From Record Attention: the edit then runs two rows a step instead of three.",
                ),
                io.Float.Input(
                    "value_replace",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Until where in the run words of both prompts show what Value Inversion found for them. Higher "
                        "keeps more of the image's looks. Without that node's trajectory it does nothing. Paper: 0.5."
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
        preset,
        cross_replace,
        self_replace,
        reweight,
        word_schedule,
        cross_replace_start,
        self_replace_start,
        self_max_side,
        attention_store=None,
        value_replace=0.5,
    ) -> io.NodeOutput:
        cross, self_ = Window(cross_replace_start, cross_replace), Window(self_replace_start, self_replace)
        for name, window in (("cross_replace", cross), ("self_replace", self_)):
            if preset == CUSTOM and window.end > 0:  # at 0 it is off
                check_window(f"{name} of P2P Attention Controller", *astuple(window), (f"{name}_start", name))
        settings = PRESETS.get(preset) or Settings(cross, self_, self_max_side)
        words = reweight, word_schedule
        edited = prompt_to_prompt(
            model, trajectory, prompt_edit, settings, *words, attention_store, value_replace=value_replace
        )
        return io.NodeOutput(edited)
