"""The node that edits by the difference of two predictions, under any sampler of the host."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.files.trajectory import Trajectory
from ..inversion.diffedit import RunRegion
from ..inversion.flow_edit import NODE, edit_image, edit_trajectory
from . import sockets
from .widgets import encoded, encoder

FRESH, ONE = "fresh at each step", "one noise"


class FlowEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestFlowEdit",
            display_name=NODE,
            category="Palimpsest/edit",
            description=(
                "Edits your image without inverting it: put it on the MODEL of an img2img workflow, before a plain "
                "KSampler, whose denoise is then the strength, and cfg the guidance. Set Latent Noise Mask says "
                "where. For Flux, Qwen-Image, Z-Image, SD3, Wan and all other flow models, and for SD1.5 and SDXL too."
            ),
            search_aliases=[
                "flowedit",
                "flowalign",
                "flux edit",
                "qwen edit",
                "z-image edit",
                "sd3 edit",
                "edit image",
                "inversion free",
                "edit without inversion",
                "img2img edit",
                "rectified flow edit",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to edit with, without edits."),
                io.MultiType.Input(
                    "image",
                    [io.Latent, io.Image, sockets.Trajectory],
                    tooltip=(
                        "The image or batch of images, beside vae or from VAE Encode. A trajectory of DDIM Inversion "
                        "in its place is followed instead of noise."
                    ),
                ),
                io.Conditioning.Input(
                    "source",
                    optional=True,
                    tooltip=(
                        "The prompt that says what the image shows. Behind FluxGuidance it has a guidance of its own: "
                        "1.5 in the paper, and 5.5 for the target. Not needed beside a trajectory, which has one."
                    ),
                ),
                io.Float.Input(
                    "source_cfg",
                    default=1.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip=(
                        "Guidance of the source's prediction by the sampler's negative prompt. 1 costs least; the "
                        "paper has 3.5 for SD3 beside a cfg of 13.5."
                    ),
                ),
                io.Combo.Input(
                    "noise",
                    options=[FRESH, ONE],
                    default=FRESH,
                    tooltip=(
                        "The paper draws noise anew at each step, which keeps more of the image on the demo model than "
                        "one noise throughout. A trajectory takes the place of either."
                    ),
                ),
                io.Float.Input(
                    "pull",
                    default=0.0,
                    min=0.0,
                    max=0.5,
                    step=0.005,
                    round=0.001,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "How much of its change each step takes back. FlowAlign: 0.01, with the source prompt as the "
                        "sampler's negative too."
                    ),
                ),
                encoder(),
                io.Float.Input(
                    "confine",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip=(
                        "Keeps the image exactly as it was where the two predictions differ less than this. 0 edits "
                        "everywhere, 0.3 confines; higher keeps more. Costs nothing."
                    ),
                ),
                io.Float.Input(
                    "confine_after",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="How much of the run confine looks at, before it puts the rest of the image back.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model whose samples are the edited image."),
                io.Latent.Output(
                    "latent",
                    tooltip="The image: latent_image of KSampler, whose denoise below 1 keeps its layout.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, image, source_cfg, noise, source=None, pull=0.0, vae=None, confine=0.0, confine_after=0.1
    ) -> io.NodeOutput:
        region = RunRegion(confine, confine_after) if confine else None
        if isinstance(image, Trajectory):
            edited = edit_trajectory(model, image, source, source_cfg, pull, region)
            return io.NodeOutput(edited, {"samples": model.model.process_latent_out(image.states[-1])})
        if source is None:
            raise ValueError(f"{NODE} was given an image but no source: connect the prompt that says what it shows.")
        latent = encoded(image, vae, NODE)
        mask = latent.get("noise_mask")
        return io.NodeOutput(
            edit_image(model, source, latent["samples"], noise == FRESH, source_cfg, pull, mask, region), latent
        )
