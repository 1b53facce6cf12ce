"""Nodes of the embedded demo model, for trying the pack without a download."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..demo import model, scenes
from .widgets import seed_of


class LoadDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLoadDemoModel",
            display_name="Load Demo Model",
            category="Palimpsest/demo",
            description=(
                "A small model that comes with the pack. It draws one or two coloured shapes on a background, 64 x 64 "
                "pixels, from captions such as 'a small red star next to a blue circle on a striped green background'."
            ),
            search_aliases=["demo checkpoint", "toy model", "tiny model", "test model"],
            outputs=[
                io.Model.Output("model", tooltip="The diffusion model, laid out like SD1.5's, only smaller."),
                io.Clip.Output("clip", tooltip="Its text encoder. It knows the words of Demo Scene captions only."),
                io.Vae.Output("vae", tooltip="Its autoencoder, 64 x 64 pixels to 16 x 16 latents."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*model.load())


class DemoScene(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        words = (
            f"Shapes: {', '.join(scenes.SHAPES)}. Colours: {', '.join(scenes.COLORS)}. Sizes: small, large. "
            f"Textures: striped, checkered. Backgrounds: {', '.join(scenes.BACKGROUNDS)}."
        )
        return io.Schema(
            node_id="PalimpsestDemoScene",
            display_name="Demo Scene",
            category="Palimpsest/demo",
            description=(
                "Draws the scene of a caption, and the same scene under an edited caption: the one right answer to the "
                "edit, to hold a result against."
            ),
            search_aliases=["test image", "ground truth", "demo image", "example image"],
            inputs=[
                io.String.Input(
                    "caption",
                    default="a red circle on a blue background",
                    tooltip=f"'a [size] colour shape [next to|above a ...] on a [texture] colour background'. {words}",
                ),
                io.String.Input(
                    "edited_caption",
                    default="a red star on a blue background",
                    tooltip="The caption with some words swapped. The layout stays that of the first.",
                ),
                seed_of("Where the things stand, and their exact size."),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The scene of the caption, 64 x 64 pixels."),
                io.String.Output("source_prompt", tooltip="The caption, for Prompt Edit."),
                io.String.Output("target_prompt", tooltip="The edited caption, for Prompt Edit."),
                io.Image.Output("answer", tooltip="The scene of the edited caption: what a perfect edit gives."),
                io.Mask.Output("changed", tooltip="White where the two scenes differ."),
            ],
        )

    @classmethod
    def execute(cls, caption, edited_caption, seed) -> io.NodeOutput:
        drawn = [scenes.render(scenes.parse(text, seed)) for text in (caption, edited_caption)]
        image, answer = (torch.from_numpy(picture)[None] for picture in drawn)
        mask = torch.from_numpy(scenes.changed(*drawn)).float()[None]
        return io.NodeOutput(image, caption, edited_caption, answer, mask)
