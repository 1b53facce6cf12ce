"""Nodes of the embedded demo models, for trying the pack without a download."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..demo import model, scenes
from ..demo.clip import load_clip
from ..demo.flow import load_flow
from ..demo.instruct import load_instruct
from . import sockets
from .widgets import seed_of


class LoadDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLoadDemoModel",
            display_name="Load Demo Model",
            category="Palimpsest/demo",
            description=(
                "A small model that comes with the pack. It draws one or two everyday things at a place, 128 x 128 "
                "pixels, from captions such as 'a photo of a red cat with a hat next to a house in the snow at sunset'."
            ),
            search_aliases=[
                "demo checkpoint",
                "toy model",
                "tiny model",
                "test model",
                "lcm",
                "few steps",
                "distilled",
            ],
            inputs=[
                io.Boolean.Input(
                    "few_steps",
                    default=False,
                    optional=True,
                    tooltip=(
                        "Adds a LoRA by which 4 to 8 steps at cfg 1 do: sampler euler or lcm, scheduler simple. Off is "
                        "the model for 20 steps and more at cfg 3 to 5."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The diffusion model, laid out like SD1.5's, only smaller."),
                io.Clip.Output("clip", tooltip="Its text encoder. It knows the words of Demo Scene captions only."),
                io.Vae.Output("vae", tooltip="Its autoencoder, 128 x 128 pixels to 16 x 16 latents."),
            ],
        )

    @classmethod
    def execute(cls, few_steps=False) -> io.NodeOutput:
        return io.NodeOutput(*model.load(few_steps=few_steps))


class LoadDemoFlowModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLoadDemoFlowModel",
            display_name="Load Demo Flow Model",
            category="Palimpsest/demo",
            description=(
                "A small flow transformer that comes with the pack, laid out like Flux: Flow Edit, inversion and "
                "attention reads on a flow model without a download. It draws what Load Demo Model draws, 128 x 128 "
                "pixels, from the same captions."
            ),
            search_aliases=["demo flux", "tiny flux", "toy flux", "flow demo", "rectified flow", "dit", "test model"],
            outputs=[
                io.Model.Output("model", tooltip="The flow transformer, laid out like Flux schnell, only smaller."),
                io.Clip.Output("clip", tooltip="Its text encoder. It knows the words of Demo Scene captions only."),
                io.Vae.Output("vae", tooltip="Its autoencoder, 128 x 128 pixels to 16 x 16 latents."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        _, clip, vae = model.load()
        return io.NodeOutput(load_flow(), clip, vae)


class LoadDemoClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLoadDemoCLIP",
            display_name="Load Demo CLIP",
            category="Palimpsest/demo",
            description=(
                "A small CLIP that comes with the pack and sees pictures of the demo model through noise, for CLIP "
                "Guidance as GLIDE does it. Prompts are captions such as Demo Scene's."
            ),
            search_aliases=["noised clip", "noise-aware clip", "glide", "demo clip", "tiny clip", "toy clip"],
            outputs=[
                sockets.NoisedClip.Output(
                    "noised_clip", tooltip="For CLIP Guidance on Load Demo Model's MODEL, with or without few_steps."
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        devices = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
        return io.NodeOutput(ModelPatcher(load_clip(), *devices))


class LoadDemoInstructModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLoadDemoInstructModel",
            display_name="Load Demo Instruct Model",
            category="Palimpsest/demo",
            description=(
                "A small InstructPix2Pix that comes with the pack: it edits pictures of 128 x 128 pixels such as Demo "
                "Scene's by an instruction such as 'make the cat a dog', 'turn the car red', 'put it in the snow', 'as "
                "a pencil drawing' or 'remove the hat'. For Instruct Guidance."
            ),
            search_aliases=["instructpix2pix", "ip2p", "instruct pix2pix", "demo instruct", "test model"],
            outputs=[
                io.Model.Output("model", tooltip="The demo model with channels for an image beside the latent."),
                io.Clip.Output("clip", tooltip="Its text encoder. It knows the words of instructions and captions."),
                io.Vae.Output("vae", tooltip="Its autoencoder, 128 x 128 pixels to 16 x 16 latents."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_instruct())


class LoadDemoInpaintModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLoadDemoInpaintModel",
            display_name="Load Demo Inpaint Model",
            category="Palimpsest/demo",
            description=(
                "Load Demo Model as an inpainting checkpoint: with InpaintModelConditioning it draws what a mask "
                "hides, from the same captions, 128 x 128 pixels."
            ),
            search_aliases=["demo inpainting", "inpaint checkpoint", "fill mask", "glide", "toy inpaint", "test model"],
            outputs=[
                io.Model.Output("model", tooltip="The diffusion model, laid out like SD1.5 inpainting, only smaller."),
                io.Clip.Output("clip", tooltip="Its text encoder. It knows the words of Demo Scene captions only."),
                io.Vae.Output("vae", tooltip="Its autoencoder, 128 x 128 pixels to 16 x 16 latents."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*model.load_inpaint())


class LoadDemoControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLoadDemoControlNet",
            display_name="Load Demo ControlNet",
            category="Palimpsest/demo",
            description=(
                "A small ControlNet for edges that comes with the pack: with Apply ControlNet and a picture from "
                "Canny, Load Demo Model keeps the outlines of that picture, whatever the prompt says."
            ),
            search_aliases=[
                "demo controlnet",
                "canny controlnet",
                "edges",
                "outlines",
                "control lora",
                "toy controlnet",
                "test model",
            ],
            outputs=[
                io.ControlNet.Output(
                    "control_net", tooltip="For Apply ControlNet, on prompts that go with Load Demo Model's MODEL."
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(model.load_control())


class DemoScene(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        listed = {
            "Styles": scenes.STYLES,
            "Sizes": filter(None, scenes.SIZES),
            "Poses of cat, dog, rabbit and sheep": scenes.POSES,
            "Colours": scenes.COLORS,
            "Materials, instead of a colour": scenes.MATERIALS,
            "Things": scenes.KINDS,
            "Parts": ["facing left", "facing right", *scenes.EXTRAS],
            "Places": scenes.PLACES.values(),
            "Times": filter(None, scenes.TIMES),
        }
        words = " ".join(f"{what}: {', '.join(choices)}." for what, choices in listed.items())
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
                    default="a photo of a cat on a meadow",
                    tooltip=(
                        "'style a [size] [pose] [colour or material] thing [part] [next to|in front of a ...] place "
                        f"[time]'. {words} Help has captions to try."
                    ),
                ),
                io.String.Input(
                    "edited_caption",
                    default="a photo of a dog on a meadow",
                    tooltip="The caption with words swapped, added or left out. The layout stays that of the first.",
                ),
                seed_of("Where the things stand, their exact size, and from where the place is seen."),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The scene of the caption, 128 x 128 pixels."),
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
