"""Nodes that turn an image, or a sampling run, into a trajectory."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io

from ..host.files.trajectory import DPMPP_2M, EULER
from ..host.run.cost import metered
from ..host.run.model import noise_latent, told_distilled
from ..host.run.refusals import check_no_mask
from ..inversion.run import UNI_INV, Guidance, Refinement, ddim_sigmas, invert, record
from . import sockets
from .telling import HIDDEN, tell
from .widgets import (
    encoder,
    image_to_invert,
    inverting_negative,
    latent_of,
    noise_and_sigmas,
    noise_and_sigmas_of,
    spent,
)

LEADING = "ddim (diffusers leading)"
SOLVERS = {"ddim (euler)": EULER, DPMPP_2M: DPMPP_2M, "uni-inv (euler)": UNI_INV}
DDIM, *_ = SOLVERS


def weight(name: str, tooltip: str) -> io.Float.Input:
    """How strongly the inverted noise is regularised."""
    return io.Float.Input(
        name, default=0.0, min=0.0, max=100.0, step=1.0, optional=True, advanced=True, tooltip=tooltip
    )


class DDIMInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestDDIMInversion",
            display_name="DDIM Inversion",
            category="Palimpsest/invert",
            description=(
                "Finds the noise that a deterministic sampler turns back into your image, and keeps every step on the "
                "way. Connect the trajectory to the edit nodes and to Edit Sampler. Edits look the source up in the "
                "trajectory, which is Direct Inversion. For SD1.5, SD2.x and SDXL, and for flow models such as Flux."
            ),
            search_aliases=[
                "invert",
                "unsample",
                "unsampler",
                "direct inversion",
                "pnp inversion",
                "noise from image",
                "real image",
                "img2img edit",
                "flux inversion",
                "flow inversion",
                "uni-inv",
                "rf inversion",
            ],
            inputs=[
                *image_to_invert(),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=999,
                    tooltip="More steps reconstruct better and take longer. The edit runs the same number.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance while inverting. 1 reconstructs best and costs least; above it the path drifts.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=[LEADING, *comfy.samplers.SCHEDULER_NAMES],
                    default=LEADING,
                    tooltip=(
                        "Which noise levels to visit. The default is that of the papers and of diffusers, on flow "
                        "models KSampler's simple; Edit Sampler fits any. KSampler Advanced fits the default with "
                        "ddim_uniform at 10, 20, 25, 40, 50 or 100 steps; otherwise choose its scheduler here."
                    ),
                ),
                inverting_negative(),
                io.Int.Input(
                    "iterations",
                    default=0,
                    min=0,
                    max=50,
                    optional=True,
                    tooltip=(
                        "Fixed-point iterations a step: 0 is plain DDIM inversion, or Uni-Inv on flow models; 1 to 3 "
                        "reconstruct much better. Each costs a model call."
                    ),
                ),
                io.Int.Input(
                    "average",
                    default=1,
                    min=1,
                    max=51,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "How many of a step's last predictions are averaged; there is one more than iterations. "
                        "1 takes the last alone. The paper's code averages 2 of 10 where there is much noise."
                    ),
                ),
                weight("autocorrelation", "How strongly the noise is kept from repeating itself. Paper: 20; 0 is off."),
                weight("kl", "How strongly the noise is kept at mean 0 and variance 1. Paper: 20; 0 is off."),
                encoder(),
                io.Combo.Input(
                    "solver",
                    options=[*SOLVERS],
                    default=DDIM,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "How to step. uni-inv reconstructs much better for one model call more a run; flow models "
                        "always have it. dpmpp_2m does so for that sampler, without iterations: Edit Sampler takes it "
                        "by itself, elsewhere choose the sampler dpmpp_2m."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "How much of the schedule is inverted, and so run by the edit. Less costs less and keeps more; "
                        "Uni-Edit has 0.6 to 0.8."
                    ),
                ),
            ],
            hidden=HIDDEN,
            outputs=[
                sockets.Trajectory.Output("trajectory", tooltip="The image at every noise level, for the edit nodes."),
                *noise_and_sigmas(),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        source,
        image,
        steps,
        cfg,
        schedule,
        negative=None,
        iterations=0,
        average=1,
        autocorrelation=0.0,
        kl=0.0,
        vae=None,
        solver=DDIM,
        strength=1.0,
    ) -> io.NodeOutput:
        samples = latent_of(image, vae, "DDIM Inversion")
        if schedule == LEADING:
            sigmas = ddim_sigmas(model, steps)
        else:
            model_sampling = model.get_model_object("model_sampling")
            sigmas = comfy.samplers.calculate_sigmas(model_sampling, schedule, steps).cpu()
        run = round(strength * (len(sigmas) - 1))
        if run == 0:
            raise ValueError(f"DDIM Inversion runs none of {steps} steps at strength {strength:g}: raise strength.")
        sigmas = sigmas[-run - 1 :]
        refinement = Refinement(iterations, average, autocorrelation, kl)
        model, cost = metered(model)
        trajectory = invert(model, Guidance(source, negative, cfg), samples, sigmas, refinement, SOLVERS[solver])
        shown = spent(cost, trajectory, model, told_distilled(model))
        return tell(cls, trajectory, *noise_and_sigmas_of(model, trajectory), ui=shown)


class RecordTrajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestRecordTrajectory",
            display_name="Record Trajectory",
            category="Palimpsest/invert",
            description=(
                "SamplerCustom that also keeps every step, so that a generated image can be edited like a real one. "
                "Fed with inverted noise at a guidance above 1 it gives the drifting source of DDIM + Prompt-to-Prompt."
            ),
            search_aliases=["edit generated image", "ddim baseline", "sample and record", "source image"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with, without edits."),
                io.Boolean.Input(
                    "add_noise", default=True, tooltip="On for a new image; off when latent_image already is noise."
                ),
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="The seed of the noise: another seed, another image.",
                ),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly the image follows the prompt: 7.5 for SD1.5, 3 to 5 for the demo model.",
                ),
                io.Conditioning.Input("positive", tooltip="What the image shows: Prompt Edit's source output."),
                io.Conditioning.Input("negative", tooltip="What the image should not show; often an empty prompt."),
                io.Sampler.Input("sampler", tooltip="A deterministic sampler, such as euler or ddim."),
                io.Sigmas.Input("sigmas", tooltip="The schedule; the edit must run the same one."),
                io.Latent.Input("latent_image", tooltip="An empty latent to fill, or noise from DDIM Inversion."),
            ],
            hidden=HIDDEN,
            outputs=[
                sockets.Trajectory.Output("trajectory", tooltip="The image at every noise level, for the edit nodes."),
                io.Latent.Output("image", tooltip="The sampled image."),
                io.Latent.Output(
                    "noise", tooltip="Where it started: latent_image of the edit's sampler, add_noise off."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, add_noise, noise_seed, cfg, positive, negative, sampler, sigmas, latent_image
    ) -> io.NodeOutput:
        check_no_mask(latent_image, "Record Trajectory")
        samples = comfy.sample.fix_empty_latent_channels(
            model, latent_image["samples"], latent_image.get("downscale_ratio_spacial")
        )
        if add_noise:
            noise = comfy.sample.prepare_noise(samples, noise_seed, latent_image.get("batch_index"))
        else:
            noise = torch.zeros_like(samples)
        guidance = Guidance(positive, negative, cfg)
        model, cost = metered(model)
        trajectory, image = record(model, guidance, sampler, sigmas, noise, samples, noise_seed)
        noise = noise_latent(model, trajectory)
        return tell(cls, trajectory, {"samples": image}, {"samples": noise}, ui=spent(cost, trajectory, model))
