"""The node that finds where two prompts differ in an image."""

from __future__ import annotations

from comfy_api.latest import io
from torch.nn.functional import interpolate

from ..inversion.diffedit import NODE, RATIO, Settings, difference_mask
from .widgets import encoder, fraction, image_to_invert, latent_of, seed_of


class DifferenceMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestDifferenceMask",
            display_name=NODE,
            category="Palimpsest/edit",
            description=(
                "DiffEdit's mask: finds the part of your image that an edit has to change, from where the model sees "
                "something else by the target prompt than by the source prompt. Connect it to Local Blend, which keeps "
                "the rest of the image."
            ),
            search_aliases=["diffedit", "automatic mask", "auto mask", "prompt difference mask", "mask from prompts"],
            inputs=[
                *image_to_invert(),
                io.Conditioning.Input("target", tooltip="What the edit should show: Prompt Edit's target output."),
                fraction(
                    "threshold",
                    0.3,
                    "Lower makes the mask larger. 0 gives the differences themselves, from 0 to 1.",
                ),
                io.Float.Input(
                    "ratio",
                    default=RATIO,
                    min=1.0,
                    max=20.0,
                    step=0.1,
                    tooltip=(
                        "How many times the image's mean difference counts as 1. Lower makes the mask larger: a few "
                        "strong differences do not hide the others."
                    ),
                ),
                io.Float.Input(
                    "noise_level",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How much noise the image gets before the model looks: more finds rougher regions.",
                ),
                io.Int.Input(
                    "noises",
                    default=10,
                    min=1,
                    max=100,
                    tooltip="Over how many noises the differences are averaged. More is smoother and takes longer.",
                ),
                seed_of("The seed of the noises."),
                encoder(),
            ],
            outputs=[io.Mask.Output("mask", tooltip="1 where to edit, for each image. Eight times the latent's size.")],
        )

    @classmethod
    def execute(
        cls, model, source, image, target, threshold, ratio, noise_level, noises, seed, vae=None
    ) -> io.NodeOutput:
        settings = Settings(noise_level, noises, ratio, seed)
        differences = difference_mask(model, source, target, latent_of(image, vae, NODE), settings)
        found = (differences > threshold).float() if threshold > 0 else differences
        return io.NodeOutput(interpolate(found[:, None], scale_factor=8, mode="nearest")[:, 0])
