"""The node that edits without inversion."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io

from ..inversion.virtual import NODE, PRESETS, invert_virtually, schedule
from . import sockets
from .widgets import encoded, encoder, seed_of


class VirtualInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestVirtualInversion",
            display_name=NODE,
            category="Palimpsest/invert",
            description=(
                "Edits your image without inverting it, in 4 to 15 steps: adds noise to it, and at each step moves it "
                "by the difference of what the model sees in it by the two prompts. Sample the returned MODEL with "
                "Edit Sampler, or with KSampler from the latent output. P2P, PnP and MasaCtrl may be added to it."
            ),
            search_aliases=[
                "infedit",
                "flowedit",
                "turboedit",
                "edit friendly",
                "ddcm",
                "inversion free",
                "edit without inversion",
                "few steps",
                "lcm edit",
                "turbo edit",
                "edit image",
                "img2img edit",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to edit with, without edits: SD1.5, SDXL, Flux or another flow model."
                ),
                io.Conditioning.Input(
                    "source", tooltip="The prompt that says what the image shows: Prompt Edit's source output."
                ),
                io.MultiType.Input(
                    "image",
                    [io.Latent, io.Image],
                    tooltip=(
                        "The image or batch of images, beside vae or from VAE Encode. Behind Set Latent Noise Mask it "
                        "is edited inside the mask alone."
                    ),
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=next(iter(PRESETS)),
                    tooltip=(
                        "Whose edit to make, which is a sampler and its noise: FlowEdit's is euler, InfEdit's lcm, the "
                        "edit-friendly one euler_ancestral. In KSampler choose that sampler yourself. InfEdit changes "
                        "most."
                    ),
                ),
                io.Int.Input(
                    "steps", default=8, min=1, max=999, tooltip="Steps to run: 8 to 15, or 4 where time is short."
                ),
                io.Float.Input(
                    "strength",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Where in the schedule to start, as the denoise of KSampler. Higher changes more; lower keeps "
                        "more."
                    ),
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="karras",
                    advanced=True,
                    tooltip="Which noise levels to visit, as in KSampler; simple for flow models.",
                ),
                seed_of("The seed of the noise: another seed, another edit."),
                encoder(),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model whose samples are the edited image."),
                sockets.Trajectory.Output("trajectory", tooltip="The image with its noise, for edit nodes."),
                io.Latent.Output("latent", tooltip="The image: latent_image of KSampler or SamplerCustom, with noise."),
                io.Sampler.Output("sampler", tooltip="The preset's sampler, for Edit Sampler or SamplerCustom."),
                io.Sigmas.Output("sigmas", tooltip="The schedule, for SamplerCustom."),
            ],
        )

    @classmethod
    def execute(
        cls, model, source, image, preset, steps, strength, scheduler="karras", seed=0, vae=None
    ) -> io.NodeOutput:
        latent, method = encoded(image, vae, NODE), PRESETS[preset]
        sigmas = schedule(model, scheduler, steps, strength)
        mask = latent.get("noise_mask")
        model, trajectory = invert_virtually(model, source, latent["samples"], sigmas, method.fresh, mask, seed)
        return io.NodeOutput(model, trajectory, latent, comfy.samplers.sampler_object(method.sampler), sigmas.clone())
