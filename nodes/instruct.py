"""The node that edits an image by an instruction, with an InstructPix2Pix checkpoint."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..guidance.instruct import NODE, Instruct
from ..host.branch.instructed import attach_instruction


class InstructGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestInstructGuidance",
            display_name=NODE,
            category="Palimpsest/guide",
            description=(
                "InstructPix2Pix: an image is edited by an instruction such as 'make the cat a dog', without an "
                "inversion. For checkpoints that take an image beside the latent. Sample the returned MODEL from the "
                "latent: the instruction is the positive, an empty prompt the negative, and cfg the text scale, 7.5."
            ),
            search_aliases=[
                "instructpix2pix",
                "instruct pix2pix",
                "ip2p",
                "edit by instruction",
                "cosxl edit",
                "image guidance",
            ],
            inputs=[
                io.Model.Input("model", tooltip="An InstructPix2Pix checkpoint, or Load Demo Instruct Model's."),
                io.Image.Input(
                    "image", tooltip="The image to edit, of the size to sample at: about 512 pixels for SD1.5."
                ),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the MODEL."),
                io.Float.Input(
                    "image_scale",
                    default=1.5,
                    min=0.0,
                    max=20.0,
                    step=0.05,
                    tooltip=(
                        "How strongly the result keeps to the image: 1.2 to 1.8. Higher keeps more, lower changes "
                        "more. 1 runs two rows a step, else three."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model for any sampler with a negative prompt."),
                io.Latent.Output("latent", tooltip="An empty latent of the image's size, for the sampler."),
            ],
        )

    @classmethod
    def execute(cls, model, image, vae, image_scale) -> io.NodeOutput:
        latent = vae.encode(image[..., :3])
        shown = attach_instruction(model, latent, Instruct(image_scale))
        return io.NodeOutput(shown, {"samples": torch.zeros_like(latent)})
