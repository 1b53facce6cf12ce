"""Nodes that keep conditionings on disk."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.files import conditioning as conditionings
from . import files
from .telling import tell
from .widgets import saved_file, saved_name


class SaveConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestSaveConditioning",
            display_name="Save Conditioning",
            category="Palimpsest/invert",
            description=(
                "Writes a conditioning to the output folder, such as the negatives that Null Text Inversion took "
                "minutes to find."
            ),
            search_aliases=["export conditioning", "save embedding", "save null text", "save prompt"],
            is_output_node=True,
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="What to write: embeddings, numbers and words, but no ControlNet."
                ),
                saved_name("conditioning/prompt"),
            ],
            outputs=[io.Conditioning.Output("conditioning", tooltip="The same conditioning, to go on with.")],
        )

    @classmethod
    def execute(cls, conditioning, filename_prefix) -> io.NodeOutput:
        path, shown = files.fresh(filename_prefix, "Save Conditioning")
        conditionings.save(conditioning, path)
        return tell(cls, conditioning, ui={"text": [shown]})


class LoadConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLoadConditioning",
            display_name="Load Conditioning",
            category="Palimpsest/invert",
            description="Reads a conditioning that Save Conditioning wrote, from the output or the input folder.",
            search_aliases=["import conditioning", "load embedding", "load null text", "load prompt"],
            inputs=[saved_file()],
            outputs=[
                io.Conditioning.Output("conditioning", tooltip="What was saved: positive or negative of a sampler.")
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        return files.verdict(file, "Load Conditioning")

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return files.version(file, "Load Conditioning")

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(conditionings.load(files.existing(file, "Load Conditioning")))
