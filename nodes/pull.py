"""The node that draws sampling to an image."""

from __future__ import annotations

from comfy_api.latest import io

from ..guidance.rf_inversion import ImagePull
from ..host.branch.pulled import attach_pull
from ..host.files.trajectory import Trajectory
from ..host.run.model import fitting
from ..host.run.refusals import check_latent, check_same_model
from . import sockets
from .widgets import check_window, encoder, fraction, latent_of

NODE = "Image Pull"


class ImagePullNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestImagePull",
            display_name=NODE,
            category="Palimpsest/guide",
            description=(
                "RF-Inversion's controller: in the first steps of sampling, what the model sees is drawn to your "
                "image, so that its layout and colours stay while the prompt re-draws it. For inverted noise in Edit "
                "Sampler or any other sampler, beside edit nodes or alone; on Flux and all other flow models, SD1.5 "
                "and SDXL."
            ),
            search_aliases=["rf inversion", "rf-inversion", "controlled sampling", "stylize", "keep layout", "eta"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with, edited or not."),
                io.MultiType.Input(
                    "image",
                    [io.Latent, io.Image, sockets.Trajectory],
                    tooltip="The image or batch to stay near: a trajectory, an image beside vae, or from VAE Encode.",
                ),
                fraction("eta", 0.9, "How far each step goes to the image. 1 all the way; 0 switches this off."),
                fraction("start", 0.0, "From where in the run on it is drawn to the image."),
                fraction("end", 0.25, "Until where. Later keeps more of the image; 1 with eta 1 gives it back."),
                io.Boolean.Input(
                    "decay", default=False, advanced=True, tooltip="Whether eta falls in a line, to 0 at the run's end."
                ),
                encoder(),
            ],
            outputs=[io.Model.Output("model", tooltip="The model whose samples stay near the image.")],
        )

    @classmethod
    def execute(cls, model, image, eta, start, end, decay, vae=None) -> io.NodeOutput:
        if isinstance(image, Trajectory):
            check_same_model(model, image)
            target = image.states[-1]
        else:
            samples = fitting(model, latent_of(image, vae, NODE))
            check_latent(model, samples)
            target = model.model.process_latent_in(samples)
        if eta == 0:
            return io.NodeOutput(model)
        check_window(NODE, start, end)
        return io.NodeOutput(attach_pull(model, target.clone(), ImagePull(eta, start, end, decay)))
