"""Nodes that make edit directions in text embedding space, and move prompts along them."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..demo.captions import demo_captions
from ..guidance.direction import EditDirection, Embedded, apply, combine, direction_between
from ..guidance.sentences import as_written, templated
from . import files, sockets
from .telling import tell
from .widgets import saved_file, saved_name

NONE = "none"
NODE = "Edit Direction from Prompts"
SENTENCES = {"as written": as_written, "templates": templated, "demo captions": demo_captions}


class EditDirectionFromPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def lines(name: str, default: str, tooltip: str) -> io.String.Input:
            return io.String.Input(name, default=default, multiline=True, dynamic_prompts=False, tooltip=tooltip)

        def file(side: str) -> io.Combo.Input:
            return io.Combo.Input(
                f"{side}_file",
                options=[NONE, *files.texts()],
                default=NONE,
                advanced=True,
                tooltip=f"A .txt file of the input folder with more {side} lines.",
            )

        return io.Schema(
            node_id="PalimpsestEditDirection",
            display_name=NODE,
            category="Palimpsest/edit",
            description=(
                "pix2pix-zero: what turns one kind of thing into another, as the difference of the mean embeddings of "
                "many sentences about each. Apply Edit Direction adds it to any prompt."
            ),
            search_aliases=["pix2pix-zero", "pix2pix zero", "prompt direction", "cat to dog", "embedding difference"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model that edits."),
                lines("source", "a photo of a cat on a meadow", "What to edit: one word or sentence a line."),
                lines("target", "a photo of a dog on a meadow", "What it should become: one a line."),
                io.Combo.Input(
                    "sentences",
                    options=list(SENTENCES),
                    tooltip=(
                        "as written: every line is a sentence. templates: every line is a thing, such as cat, put into "
                        "some dozens of sentences. demo captions: it is part of a Demo Scene caption, such as red car."
                    ),
                ),
                file("source"),
                file("target"),
            ],
            outputs=[
                sockets.EditDirection.Output("edit_direction", tooltip="The direction, for Apply Edit Direction.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, source_file: str, target_file: str, **others) -> list[str]:
        return [file if file == NONE else files.version(file, NODE) for file in (source_file, target_file)]

    @classmethod
    def execute(cls, clip, source, target, sentences, source_file, target_file) -> io.NodeOutput:
        if clip is None:
            raise ValueError(f"{NODE} got no CLIP: the checkpoint holds no text encoder; load one with Load CLIP.")
        sides = [
            _sentences(*side, sentences) for side in (("source", source, source_file), ("target", target, target_file))
        ]
        progress = comfy.utils.ProgressBar(sum(map(len, sides)))
        return io.NodeOutput(direction_between(*([_embedded(clip, s, progress) for s in side] for side in sides)))


class CombineEditDirections(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def weight(name: str, tooltip: str, **more) -> io.Float.Input:
            return io.Float.Input(name, default=1.0, min=-10.0, max=10.0, step=0.05, tooltip=tooltip, **more)

        return io.Schema(
            node_id="PalimpsestCombineEditDirections",
            display_name="Combine Edit Directions",
            category="Palimpsest/edit",
            description="Adds two edit directions, each by its weight, or scales one. A negative weight turns it.",
            search_aliases=["add directions", "scale direction", "reverse direction", "mix edits"],
            inputs=[
                sockets.EditDirection.Input("direction_a", tooltip="A direction from Edit Direction from Prompts."),
                weight("weight_a", "How far it goes. -1 is the way back."),
                sockets.EditDirection.Input("direction_b", optional=True, tooltip="Another one from the same CLIP."),
                weight("weight_b", "How far the other one goes.", optional=True),
            ],
            outputs=[sockets.EditDirection.Output("edit_direction", tooltip="The sum, for Apply Edit Direction.")],
        )

    @classmethod
    def execute(cls, direction_a, weight_a, direction_b=None, weight_b=1.0) -> io.NodeOutput:
        terms = [(direction_a, weight_a)] + ([(direction_b, weight_b)] if direction_b is not None else [])
        return io.NodeOutput(combine(terms))


class ApplyEditDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestApplyEditDirection",
            display_name="Apply Edit Direction",
            category="Palimpsest/edit",
            description=(
                "Moves a prompt along an edit direction: what the image shows becomes what it should show. Connect the "
                "source prompt, and the result to positive of the sampler that edits."
            ),
            search_aliases=["pix2pix-zero edit", "add direction", "move prompt", "embedding arithmetic"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt to move: what the image shows."),
                sockets.EditDirection.Input("edit_direction", tooltip="Where to: made with the same CLIP."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How far. 0 leaves the prompt as it is; above 1 the edit shows more, and so do its flaws.",
                ),
            ],
            outputs=[io.Conditioning.Output("conditioning", tooltip="The moved prompt: positive of the sampler.")],
        )

    @classmethod
    def execute(cls, conditioning, edit_direction, strength) -> io.NodeOutput:
        return io.NodeOutput(apply(conditioning, edit_direction, strength))


class SaveEditDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestSaveEditDirection",
            display_name="Save Edit Direction",
            category="Palimpsest/edit",
            description="Writes an edit direction to the output folder, so that it need be made only once.",
            search_aliases=["export direction", "keep direction"],
            is_output_node=True,
            inputs=[
                sockets.EditDirection.Input("edit_direction", tooltip="What to write: 0.2 MB for SD1.5, 0.6 for SDXL."),
                saved_name("directions/edit"),
            ],
            outputs=[sockets.EditDirection.Output("edit_direction", tooltip="The same direction, to go on with.")],
        )

    @classmethod
    def execute(cls, edit_direction, filename_prefix) -> io.NodeOutput:
        path, shown = files.fresh(filename_prefix, "Save Edit Direction")
        edit_direction.save(path)
        return tell(cls, edit_direction, ui={"text": [shown]})


class LoadEditDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLoadEditDirection",
            display_name="Load Edit Direction",
            category="Palimpsest/edit",
            description="Reads an edit direction that Save Edit Direction wrote, from the output or the input folder.",
            search_aliases=["import direction"],
            inputs=[saved_file()],
            outputs=[
                sockets.EditDirection.Output("edit_direction", tooltip="The direction, for Apply Edit Direction.")
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        return files.verdict(file, "Load Edit Direction")

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return files.version(file, "Load Edit Direction")

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(EditDirection.load(files.existing(file, "Load Edit Direction")))


def _sentences(side: str, typed: str, file: str, kind: str) -> list[str]:
    lines = [typed, "" if file == NONE else files.text(file, NODE)]
    lines = [line.strip() for line in "\n".join(lines).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"The {side} list of {NODE} is empty: type a word or sentence a line, or choose a file.")
    return [sentence for line in lines for sentence in SENTENCES[kind](line)]


def _embedded(clip, sentence: str, progress: comfy.utils.ProgressBar) -> Embedded:
    comfy.model_management.throw_exception_if_processing_interrupted()
    embedded = Embedded(*clip.encode_from_tokens(clip.tokenize(sentence), return_pooled=True))
    progress.update(1)
    return embedded
