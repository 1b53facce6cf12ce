"""The node that shows where words are attended to."""

from __future__ import annotations

import comfy.utils
from comfy_api.latest import io

from ..attention.alignment import PromptEdit, same_prompt
from ..attention.heatmap import colored, word_heat
from ..attention.phrases import prompt_columns, split_phrases
from ..host.files.store import AttentionStore
from ..host.words import Words
from . import sockets
from .widgets import fraction

PLACING, ALL = "those that place words", "all"


class AttentionMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestAttentionMaps",
            display_name="Attention Maps",
            category="Palimpsest/edit",
            description=(
                "Shows where in the image each word is attended to, as pictures and as masks. For the edited image, "
                "sample it with Record Trajectory, record its attention, and connect that."
            ),
            search_aliases=["cross attention map", "heat map", "daam", "word map", "attention heatmap", "word mask"],
            inputs=[
                sockets.AttentionStore.Input(
                    "attention_store", tooltip="The image's attention, from Record Attention."
                ),
                sockets.PromptEdit.Input("prompt_edit", tooltip="Whose prompt made the image, source or target."),
                io.String.Input(
                    "words", default="", tooltip="Words or phrases with commas between them; empty for every word."
                ),
                fraction(
                    "threshold", 0.0, "0 makes soft masks; above it a mask is 1 where the map exceeds this, else 0."
                ),
                io.Image.Input("image", optional=True, tooltip="The image, to lay the maps over."),
                fraction("start", 0.0, "Where in the run the average begins.", advanced=True),
                fraction(
                    "end",
                    1.0,
                    "Where in the run it ends. Early steps place things, late ones draw them.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "layers",
                    options=[PLACING, ALL],
                    default=PLACING,
                    advanced=True,
                    tooltip="Average over the layers that Local Blend uses (a quarter of the latent's size), or all.",
                ),
            ],
            outputs=[
                io.Image.Output("maps", tooltip="A picture for each word, for each image in turn."),
                io.Mask.Output("masks", tooltip="The same as masks, in the same order."),
            ],
        )

    @classmethod
    def execute(cls, attention_store, prompt_edit, words, threshold, start, end, layers, image=None) -> io.NodeOutput:
        columns = prompt_columns(split_phrases(words), _prompt(attention_store, prompt_edit))
        height, width = attention_store.trajectory.states.shape[-2:]
        size = (8 * height, 8 * width) if image is None else tuple(image.shape[1:3])
        heat = word_heat(attention_store, columns, size, start, end, layers == ALL)
        under = None
        if image is not None:
            images = attention_store.trajectory.states.shape[1]
            under = comfy.utils.repeat_to_batch_size(image[..., :3], images).repeat_interleave(columns.shape[1], 0)
        pictures = colored(heat, under)
        masks = (heat > threshold).float() if threshold > 0 else heat
        return io.NodeOutput(pictures, masks)


def _prompt(store: AttentionStore, prompt_edit: PromptEdit) -> Words:
    """The prompt of `prompt_edit` that the store was recorded with."""
    source, targets = prompt_edit.embeddings
    embedding = store.trajectory.conditioning[0][0]
    if same_prompt(embedding, source):
        return prompt_edit.source
    if len(prompt_edit.targets) == 1 and same_prompt(embedding, targets):
        return prompt_edit.targets[0]
    raise ValueError(
        "The attention store was recorded with another prompt than this Prompt Edit's source and target: connect the "
        "Prompt Edit whose prompt made the image."
    )
