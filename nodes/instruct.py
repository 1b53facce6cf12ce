"""Nodes that edit an image by an instruction, with an InstructPix2Pix checkpoint."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..guidance.instruct import NODE, Instruct
from ..host.branch.instructed import attach_instruction

ALIASES = ["instructpix2pix", "instruct pix2pix", "ip2p", "edit by instruction", "cosxl edit", "image guidance"]


def _image_inputs() -> list[io.Input]:
    return [
        io.Image.Input("image", tooltip="The image to edit, of the size to sample at: about 512 pixels for SD1.5."),
        io.Vae.Input("vae", tooltip="The VAE that belongs to the MODEL."),
    ]


def _image_scale() -> io.Input:
    return io.Float.Input(
        "image_scale",
        default=1.5,
        min=0.0,
        max=20.0,
        step=0.05,
        tooltip=(
            "How strongly the result keeps to the image: 1.2 to 1.8. Higher keeps more, lower changes more. 1 runs two "
            "rows a step, else three."
        ),
    )


def _latent() -> io.Output:
    return io.Latent.Output("latent", tooltip="An empty latent of the image's size, for the sampler.")


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
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="An InstructPix2Pix checkpoint, or Load Demo Instruct Model's."),
                *_image_inputs(),
                _image_scale(),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model for any sampler with a negative prompt."),
                _latent(),
            ],
        )

    @classmethod
    def execute(cls, model, image, vae, image_scale) -> io.NodeOutput:
        return io.NodeOutput(*_shown(model, image, vae, image_scale, NODE))


class InstructGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestInstructGuider",
            display_name="Instruct Guider",
            category="Palimpsest/guide",
            description="Instruct Guidance as a guider, for SamplerCustomAdvanced.",
            search_aliases=[*ALIASES, "guider"],
            inputs=[
                io.Model.Input("model", tooltip="An InstructPix2Pix checkpoint, or Load Demo Instruct Model's."),
                io.Conditioning.Input("positive", tooltip="The instruction: 'make the cat a dog'."),
                io.Conditioning.Input("negative", tooltip="An empty prompt: CLIP Text Encode without a text."),
                *_image_inputs(),
                io.Float.Input(
                    "text_scale",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly the result follows the instruction: 5 to 9. Higher changes more.",
                ),
                _image_scale(),
            ],
            outputs=[io.Guider.Output("guider", tooltip="For SamplerCustomAdvanced."), _latent()],
        )

    @classmethod
    def execute(cls, model, positive, negative, image, vae, text_scale, image_scale) -> io.NodeOutput:
        shown, latent = _shown(model, image, vae, image_scale, "Instruct Guider")
        guider = CFGGuider(shown)
        guider.set_conds(positive, negative)
        guider.set_cfg(text_scale)
        return io.NodeOutput(guider, latent)


def _shown(model: ModelPatcher, image: Tensor, vae: VAE, image_scale: float, node: str) -> tuple[ModelPatcher, dict]:
    """The MODEL that is shown the image, and an empty latent of its size."""
    latent = vae.encode(image[..., :3])
    return attach_instruction(model, latent, Instruct(image_scale, node)), {"samples": torch.zeros_like(latent)}
