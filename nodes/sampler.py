"""The node that samples an edit."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host.run.cost import metered
from ..host.run.sampler import told_mismatch
from ..inversion.run import Guidance, resample
from . import sockets
from .telling import HIDDEN, tell


class EditSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestEditSampler",
            display_name="Edit Sampler",
            category="Palimpsest/edit",
            description=(
                "Samples the edited image: starts from the trajectory's noise and runs its steps, so that there is "
                "nothing to set but cfg. The same as SamplerCustom with the inverted noise and sigmas, and as the VAE "
                "Decode behind it."
            ),
            search_aliases=[
                "edit image",
                "edit photo",
                "sample edit",
                "image editing",
                "edit ksampler",
                "sampler from trajectory",
                "img2img edit",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that edits, from P2P Attention Controller or another node."),
                sockets.Trajectory.Input(
                    "trajectory", tooltip="The source image, the same as the edit's: its noise and its steps are run."
                ),
                io.Conditioning.Input("positive", tooltip="What the image should show: Prompt Edit's target output."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model; it makes the picture."),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly the image follows the prompt: 7.5 for SD1.5, 3 to 5 for the demo model.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip=(
                        "What the image should not show; often an empty prompt, or that of Null Text Inversion. Not "
                        "connected: the source prompt, which is Negative-Prompt Inversion."
                    ),
                ),
                io.Sampler.Input(
                    "sampler",
                    optional=True,
                    tooltip=(
                        "That of Edit Friendly, EDICT or OBELM Inversion, or another that adds no noise. Not "
                        "connected: the one that the image was inverted for, euler unless DDIM Inversion's solver says "
                        "dpmpp_2m."
                    ),
                ),
            ],
            hidden=HIDDEN,
            outputs=[
                io.Latent.Output("latent", tooltip="The edited image as a latent, for Local Blend Mask."),
                io.Image.Output("image", tooltip="The edited image."),
            ],
        )

    @classmethod
    def execute(cls, model, trajectory, positive, vae, cfg, negative=None, sampler=None) -> io.NodeOutput:
        guidance = Guidance(positive, trajectory.conditioning if negative is None else negative, cfg)
        model, cost = metered(model)
        samples = resample(model, trajectory, guidance, sampler)
        mismatch = None if sampler is None else told_mismatch(sampler, trajectory)
        told = ui.PreviewText(" ".join(filter(None, (f"{cost.told}.", mismatch))))
        return tell(cls, {"samples": samples}, vae.decode(samples), ui=told)
