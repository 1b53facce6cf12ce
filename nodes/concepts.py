"""The node that adds concepts to an image or takes them from it, each where it belongs."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..guidance.concepts import NODE, Concept
from ..host.branch.concepts import attach_concept
from ..host.run.tokens import prompt_words
from .widgets import check_window, fraction


class ConceptGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestConceptGuidance",
            display_name=NODE,
            category="Palimpsest/guide",
            description=(
                "LEDITS++: adds a concept to the image or takes it away, where its words are attended to and the model "
                "sees a difference; the rest stays. Several of these nodes, one behind another, edit several things "
                "at once. Made for Edit Friendly Inversion and its sampler."
            ),
            search_aliases=["ledits", "ledits++", "semantic guidance", "sega", "add concept", "remove concept"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with: an SD1.x, SD2.x or SDXL one."),
                io.Clip.Input("clip", tooltip="The text encoder of that model."),
                io.String.Input(
                    "concept",
                    default="a photo of a blue car on a street",
                    dynamic_prompts=False,
                    tooltip="What to add or to take away, in a few words.",
                ),
                io.Float.Input(
                    "scale",
                    default=5.0,
                    min=-50.0,
                    max=50.0,
                    step=0.1,
                    tooltip="How strongly. Negative takes the concept away, 0 switches the node off.",
                ),
                fraction("threshold", 0.8, "The share of the image that stays. 0 changes all of it."),
                fraction("start", 0.0, "From which part of the run on."),
                fraction("end", 1.0, "Until where."),
            ],
            outputs=[io.Model.Output("model", tooltip="The model that samples the edit.")],
        )

    @classmethod
    def execute(cls, model, clip, concept, scale, threshold, start, end) -> io.NodeOutput:
        if clip is None:
            raise ValueError(f"{NODE} got no CLIP: the checkpoint holds no text encoder; load one with Load CLIP.")
        if scale == 0:
            return io.NodeOutput(model)
        words = prompt_words(clip, concept, "concept", NODE)
        if not words.texts:
            raise ValueError(f"The concept of {NODE} is empty: type what to add or to take away.")
        check_window(NODE, start, end)
        columns = torch.zeros(words.length)
        columns[[token for tokens in words.tokens for token in tokens]] = 1
        own, empty = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (concept, ""))
        rule = Concept(own, empty, columns, scale, start, end, threshold)
        return io.NodeOutput(attach_concept(model, rule))
