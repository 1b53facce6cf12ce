"""The nodes that say which words change."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention import alignment_picture
from ..attention.alignment import ALIGNMENTS, carry_over, join, same_prompt
from ..attention.editing import rewrite
from ..host.files.conditioning import copied
from ..host.quote import shortened
from ..host.run.tokens import unknown_words
from . import alignment_view, sockets
from .telling import HIDDEN, tell


class PromptEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def prompt(name: str, default: str, tooltip: str) -> io.String.Input:
            return io.String.Input(name, default=default, multiline=True, dynamic_prompts=False, tooltip=tooltip)

        return io.Schema(
            node_id="PalimpsestPromptEdit",
            display_name="Prompt Edit",
            category="Palimpsest/edit",
            description=(
                "Two prompts: what the image shows, and what it should show instead, with words swapped, added or "
                "left out. Connect source to DDIM Inversion, target to the sampler, and the edit to P2P Attention "
                "Controller."
            ),
            search_aliases=[
                "edit image",
                "edit photo",
                "image editing",
                "img2img edit",
                "change words",
                "replace object",
                "word swap",
                "prompt refinement",
                "prompt to prompt",
                "p2p prompts",
                "source target prompt",
            ],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model that edits."),
                prompt("source_prompt", "a photo of a cat on a meadow", "What the image shows now."),
                prompt(
                    "target_prompt",
                    "a photo of a dog on a meadow",
                    "The same prompt with some words changed. What both have in common is kept.",
                ),
                io.Combo.Input(
                    "alignment",
                    options=list(ALIGNMENTS),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "swap: changed words take the places of those that they replace. refine: they find places of "
                        "their own. auto: swap if words are replaced one for one, refine if any are added or left out."
                    ),
                ),
            ],
            hidden=HIDDEN,
            outputs=[
                io.Conditioning.Output("source", tooltip="The source prompt, for DDIM Inversion or Record Trajectory."),
                io.Conditioning.Output("target", tooltip="The target prompt: positive of the sampler that edits."),
                sockets.PromptEdit.Output(
                    "prompt_edit", tooltip="Which words became which, for P2P Attention Controller."
                ),
                io.Image.Output(
                    "alignment_picture",
                    tooltip="Source words down, target words across: whose attention goes where. For Preview Image.",
                ),
            ],
        )

    @classmethod
    def execute(cls, clip, source_prompt, target_prompt, alignment="auto") -> io.NodeOutput:
        source, target, edit = rewrite(clip, source_prompt, target_prompt, alignment)
        (words,), (alignment,) = edit.targets, edit.alignments
        picture = alignment_picture.draw(edit.source, words, carry_over(edit.source, words, alignment))
        shown = alignment_view.outputs(edit.source, words, alignment, unknown_words(clip, edit.source, words))
        return tell(cls, source, target, edit, picture, ui=shown)


class BatchPromptEdits(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        edit = sockets.PromptEdit.Input("prompt_edit", tooltip="A Prompt Edit with the same source prompt.")
        return io.Schema(
            node_id="PalimpsestBatchPromptEdits",
            display_name="Batch Prompt Edits",
            category="Palimpsest/edit",
            description=(
                "Joins edits of one source prompt, so that one run samples all their targets side by side. Repeat the "
                "noise once for each target with Repeat Latent Batch."
            ),
            search_aliases=["several targets", "prompt batch", "batch edits", "join prompt edits", "compare prompts"],
            inputs=[
                io.Autogrow.Input(
                    "prompt_edits",
                    template=io.Autogrow.TemplateNames(edit, [f"prompt_edit_{i}" for i in range(1, 9)], min=2),
                    tooltip="Two to eight Prompt Edits with the same source prompt, in the order of the pictures.",
                )
            ],
            outputs=[
                io.Conditioning.Output("target", tooltip="All target prompts: positive of the sampler that edits."),
                sockets.PromptEdit.Output("prompt_edit", tooltip="All edits, for P2P Attention Controller."),
            ],
        )

    @classmethod
    def execute(cls, prompt_edits: io.Autogrow.Type) -> io.NodeOutput:
        edits = list(prompt_edits.values())
        for name, edit in prompt_edits.items():
            if not same_prompt(edit.embeddings[0], edits[0].embeddings[0]):
                raise ValueError(
                    f"Batch Prompt Edits joins edits of one source prompt, but that of {name} "
                    f"({shortened(' '.join(edit.source.texts))}) is not the first one's "
                    f"({shortened(' '.join(edits[0].source.texts))}): "
                    "give every Prompt Edit the same CLIP and source_prompt."
                )
        edit = join(edits)
        return io.NodeOutput(copied([[edit.embeddings[1], {"pooled_output": edit.pooled}]]), edit)
