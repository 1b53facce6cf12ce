"""The nodes that keep the source outside a mask."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch.nn.functional import interpolate

from ..attention.local_blend import LocalBlend
from ..attention.phrases import changed_columns, phrase_columns, split_phrases
from ..host.branch.source import attach_blend
from ..host.run.live import Live
from . import sockets
from .widgets import drawn, fraction

INTERSECT, UNITE = "intersect", "unite"
WORDS, LAYOUT = "words", "words and layout"


class LocalBlendNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLocalBlend",
            display_name="Local Blend",
            category="Palimpsest/edit",
            description=(
                "Confines an edit to where its words are: after every step everything outside a mask becomes the "
                "source again. The mask is where the words of both prompts are attended to, a mask of yours, or both."
            ),
            search_aliases=["local blend", "localblend", "prompt to prompt mask", "word mask", "keep background"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that edits, from P2P Attention Controller."),
                sockets.Trajectory.Input("trajectory", tooltip="The source image, the same as the edit's."),
                sockets.PromptEdit.Input(
                    "prompt_edit", optional=True, tooltip="The prompts; not needed where the mask alone decides."
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip=(
                        "Where to edit: words or phrases of either prompt, with commas between them. Empty: the words "
                        "in which the prompts differ."
                    ),
                ),
                io.String.Input(
                    "subtract_words", default="", tooltip="Where not to edit, even so: words or phrases, likewise."
                ),
                fraction(
                    "threshold", 0.3, "How much of a word's highest attention counts. Lower makes the mask larger."
                ),
                fraction(
                    "start",
                    0.2,
                    "From where in the run on the source is put back. 0 confines more, later frees shapes.",
                ),
                io.Int.Input(
                    "soft_edge",
                    default=1,
                    min=0,
                    max=64,
                    tooltip="Latent pixels (8 image pixels each) over which the mask by words fades out.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="Your own mask, 1 where to edit; any size."),
                io.Combo.Input(
                    "mask_mode",
                    options=[INTERSECT, UNITE],
                    default=INTERSECT,
                    advanced=True,
                    tooltip="Whether your mask limits the mask by words, or adds to it.",
                ),
                fraction(
                    "subtract_threshold", 0.3, "The threshold of subtract_words. Lower takes away more.", advanced=True
                ),
                io.Combo.Input(
                    "mask_from",
                    options=[WORDS, LAYOUT],
                    default=WORDS,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "The maps of the words alone, or spread over what looks alike in the image, with changed words "
                        "that stand side by side as one: closer to shapes. The latter for SD1.x, SD2.x and SDXL."
                    ),
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model whose samples are the source outside the mask.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        trajectory,
        words,
        subtract_words,
        threshold,
        start,
        soft_edge,
        mask_mode,
        subtract_threshold,
        prompt_edit=None,
        mask=None,
        mask_from=WORDS,
    ) -> io.NodeOutput:
        columns, phrases = None, 0
        if prompt_edit is not None:
            columns, phrases = _columns(prompt_edit, words, subtract_words, mask_from == LAYOUT)
        elif mask is None or split_phrases(words) or split_phrases(subtract_words):
            raise ValueError(
                "Local Blend needs prompt_edit to find words: connect it, or a mask and leave words empty."
            )
        blend = LocalBlend(
            columns,
            phrases,
            None if prompt_edit is None else prompt_edit.embeddings[1],
            threshold,
            subtract_threshold,
            start,
            soft_edge,
            None if mask is None else drawn(mask),
            mask_mode == UNITE,
            None if cls.hidden is None else Live(cls.hidden.unique_id).show,
            mask_from == LAYOUT,
        )
        return io.NodeOutput(attach_blend(model, trajectory, blend))


def _columns(
    prompt_edit, words: str, subtract_words: str, joined: bool
) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
    """The columns of LocalBlend, and how many of them are where to edit."""
    phrases = split_phrases(words)
    found = phrase_columns(phrases, prompt_edit, "Local Blend") if phrases else changed_columns(prompt_edit, joined)
    if not found[0].shape[2]:
        raise ValueError(
            "Local Blend has no words, and the prompts of Prompt Edit do not differ: write the words to edit."
        )
    unwanted = phrase_columns(split_phrases(subtract_words), prompt_edit, "Local Blend")
    columns = tuple(torch.cat(pair, 2) for pair in zip(found, unwanted, strict=True))
    return columns, found[0].shape[2]


class LocalBlendMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLocalBlendMask",
            display_name="Local Blend Mask",
            category="Palimpsest/edit",
            description=(
                "The mask that Local Blend came to, read from its result: 1 where the latent is not exactly the source."
            ),
            search_aliases=["edited region", "changed region", "difference mask"],
            inputs=[
                io.Latent.Input("edited", tooltip="What the sampler made of Local Blend's MODEL."),
                sockets.Trajectory.Input("trajectory", tooltip="The source image of that edit."),
                io.Model.Input("model", tooltip="The model of the edit, edited or not."),
            ],
            outputs=[io.Mask.Output("mask", tooltip="Eight times the latent's size, as the image is.")],
        )

    @classmethod
    def execute(cls, edited, trajectory, model) -> io.NodeOutput:
        source = model.model.process_latent_out(trajectory.states[-1])
        samples = edited["samples"]
        if samples.shape[1:] != source.shape[1:]:
            raise ValueError(
                f"Local Blend Mask got a latent of shape {list(samples.shape)} and a trajectory of "
                f"{list(source.shape)}: connect the trajectory of this edit."
            )
        changed = (samples != source.to(samples)).any(1, keepdim=True).float()
        return io.NodeOutput(interpolate(changed, scale_factor=8, mode="nearest")[:, 0])
