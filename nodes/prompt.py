"""The node that says which words change."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention import alignment
from ..host.tokens import token_texts
from . import sockets


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
                "Two prompts with the same number of words: what the image shows, and what it should show instead. "
                "Connect source to DDIM Inversion, target to the sampler, and the edit to P2P Attention Controller."
            ),
            search_aliases=["word swap", "prompt to prompt", "p2p prompts", "source target prompt"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model that edits."),
                prompt("source_prompt", "a red circle on a blue background", "What the image shows now."),
                prompt(
                    "target_prompt",
                    "a red star on a blue background",
                    "The same sentence with some words swapped, one for one. Everything else is kept.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("source", tooltip="The source prompt, for DDIM Inversion or Record Trajectory."),
                io.Conditioning.Output("target", tooltip="The target prompt: positive of the sampler that edits."),
                sockets.PromptEdit.Output(
                    "prompt_edit", tooltip="Which words became which, for P2P Attention Controller."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip, source_prompt, target_prompt) -> io.NodeOutput:
        if clip is None:
            raise ValueError("Prompt Edit got no CLIP: the checkpoint holds no text encoder; load one with Load CLIP.")
        tokens = {"source": clip.tokenize(source_prompt), "target": clip.tokenize(target_prompt)}
        source, target = (alignment.words(token_texts(clip, tokens[name], name)) for name in tokens)
        mapper = alignment.swap_mapper(source, target)
        conditionings = [clip.encode_from_tokens_scheduled(tokens[name]) for name in tokens]
        embeddings = tuple(conditioning[0][0] for conditioning in conditionings)
        return io.NodeOutput(*conditionings, alignment.PromptEdit(source, target, mapper, embeddings))
