"""Nodes that invert an image exactly, each with the sampler that gives it back."""

from __future__ import annotations

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..host.files.trajectory import Trajectory
from ..host.run.cost import Cost, metered
from ..inversion.replay import invert_edict, invert_edit_friendly, invert_obelm, invert_turbo_edit
from ..inversion.run import Guidance, ddim_sigmas, karras_sigmas
from . import sockets
from .telling import HIDDEN, tell
from .widgets import (
    encoder,
    fraction,
    image_to_invert,
    inverting_negative,
    latent_of,
    noise_and_sigmas,
    noise_and_sigmas_of,
    seed_of,
    spent,
)

CUSTOM, TURBO_EDIT = "custom", {"TurboEdit, 4 steps": 4, "TurboEdit, 3 steps": 3}


def common_inputs(steps: int, cfg: float) -> list[io.Input]:
    return [
        *image_to_invert(),
        io.Int.Input(
            "steps",
            default=steps,
            min=1,
            max=999,
            tooltip="Steps of the whole schedule, of which only the later part is run.",
        ),
        io.Float.Input(
            "cfg",
            default=cfg,
            min=0.0,
            max=30.0,
            step=0.1,
            tooltip="Guidance while inverting. Sampled with the same, the source prompt gives the image back.",
        ),
    ]


def outputs(sampler: str) -> list[io.Output]:
    return [
        sockets.Trajectory.Output("trajectory", tooltip="The image at every noise level, for the edit nodes."),
        *noise_and_sigmas(),
        io.Sampler.Output("sampler", tooltip=sampler),
    ]


def schedule(model: ModelPatcher, steps: int, skipped: int) -> Tensor:
    return ddim_sigmas(model, steps)[skipped:]


def answer(
    node: type[io.ComfyNode], model: ModelPatcher, cost: Cost, trajectory: Trajectory, sampler: comfy.samplers.Sampler
) -> io.NodeOutput:
    outputs = trajectory, *noise_and_sigmas_of(model, trajectory), sampler
    return tell(node, *outputs, ui=spent(cost, trajectory, model))


class EditFriendlyInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestEditFriendlyInversion",
            display_name="Edit Friendly Inversion",
            category="Palimpsest/invert",
            description=(
                "Finds noise maps for a stochastic sampler that lead to your image exactly. The sampler output replays "
                "them: with the same prompt and cfg they give the image, with another prompt an edit of it. Connect "
                "trajectory and sampler to Edit Sampler, or noise, sigmas and sampler to SamplerCustom."
            ),
            search_aliases=[
                "ddpm inversion",
                "edit friendly ddpm",
                "invert",
                "noise maps",
                "ledits",
                "turboedit",
                "sdxl turbo",
                "real image",
            ],
            inputs=[
                *common_inputs(steps=100, cfg=3.5),
                fraction("skip", 0.36, "How much of the schedule is left out. More keeps more of the image."),
                seed_of("The seed of the noise: another seed, another edit."),
                inverting_negative(),
                io.Float.Input(
                    "eta",
                    default=1.0,
                    min=0.1,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="How much noise a step has: 1 is DDPM. With less, the maps weigh less and the prompt more.",
                ),
                encoder(),
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *TURBO_EDIT],
                    default=CUSTOM,
                    optional=True,
                    tooltip=(
                        "TurboEdit, for models distilled to a few steps such as SDXL Turbo, in place of steps, cfg, "
                        "skip and eta. Sample it at cfg 1.5 with the source prompt as negative. custom is DDPM, by "
                        "the inputs above."
                    ),
                ),
            ],
            hidden=HIDDEN,
            outputs=outputs("Replays the noise maps from noise along sigmas, with any prompt and cfg."),
        )

    @classmethod
    def execute(
        cls, model, source, image, steps, cfg, skip, seed, negative=None, eta=1.0, vae=None, preset=CUSTOM
    ) -> io.NodeOutput:
        samples = latent_of(image, vae, "Edit Friendly Inversion")
        if preset != CUSTOM:
            model, cost = metered(model)
            return answer(cls, model, cost, *invert_turbo_edit(model, source, samples, TURBO_EDIT[preset], seed))
        skipped = round(skip * steps)
        if skipped == steps:
            raise ValueError(f"Edit Friendly Inversion leaves out all {steps} steps at skip {skip:g}: lower skip.")
        sigmas = schedule(model, steps, skipped)
        guidance = Guidance(source, negative, cfg)
        model, cost = metered(model)
        return answer(cls, model, cost, *invert_edit_friendly(model, guidance, samples, sigmas, eta, seed))


class EDICTInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestEDICTInversion",
            display_name="EDICT Inversion",
            category="Palimpsest/invert",
            description=(
                "Inverts your image exactly, at any guidance, by moving two coupled copies of it up to noise. The "
                "sampler output moves them down again: with the same prompt and cfg they give the image, with another "
                "prompt an edit of it. Connect trajectory and sampler to Edit Sampler, or noise, sigmas and sampler "
                "to SamplerCustom."
            ),
            search_aliases=["edict", "exact inversion", "coupled transformations", "invert", "real image"],
            inputs=[
                *common_inputs(steps=50, cfg=3.0),
                fraction("strength", 0.8, "How much of the schedule is run. More lets the prompt change more."),
                inverting_negative(),
                io.Float.Input(
                    "mixing",
                    default=0.93,
                    min=0.5,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="How far the two copies stay apart: at 1 they never mix. Paper: 0.93, from 0.9 to 0.97.",
                ),
                encoder(),
            ],
            hidden=HIDDEN,
            outputs=outputs("Moves both copies from noise along sigmas, with any prompt and cfg."),
        )

    @classmethod
    def execute(cls, model, source, image, steps, cfg, strength, negative=None, mixing=0.93, vae=None) -> io.NodeOutput:
        samples = latent_of(image, vae, "EDICT Inversion")
        skipped = steps - round(strength * steps)
        if skipped == steps:
            raise ValueError(f"EDICT Inversion runs none of {steps} steps at strength {strength:g}: raise strength.")
        guidance = Guidance(source, negative, cfg)
        sigmas = schedule(model, steps, skipped)
        model, cost = metered(model)
        return answer(cls, model, cost, *invert_edict(model, guidance, samples, sigmas, mixing))


class OBELMInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestOBELMInversion",
            display_name="OBELM Inversion",
            category="Palimpsest/invert",
            description=(
                "Inverts your image exactly at one evaluation a step, by steps that lead from two states to the next "
                "(O-BELM). The sampler output takes them back: with the same prompt and cfg they give the image, with "
                "another prompt an edit of it. Connect trajectory and sampler to Edit Sampler, or noise, sigmas and "
                "sampler to SamplerCustom."
            ),
            search_aliases=["o-belm", "belm", "exact inversion", "bidirectional", "invert", "real image"],
            inputs=[
                *common_inputs(steps=50, cfg=1.0),
                fraction("strength", 0.8, "How much of the schedule is run. More lets the prompt change more."),
                inverting_negative(),
                encoder(),
            ],
            hidden=HIDDEN,
            outputs=outputs("Takes the steps back from noise along sigmas, with any prompt and cfg."),
        )

    @classmethod
    def execute(cls, model, source, image, steps, cfg, strength, negative=None, vae=None) -> io.NodeOutput:
        samples = latent_of(image, vae, "OBELM Inversion")
        run = round(strength * steps)
        if run < 2:
            raise ValueError(
                f"OBELM Inversion needs two steps at least, but runs {run} of {steps} at strength {strength:g}: raise "
                "strength, or steps."
            )
        sigmas = karras_sigmas(model, steps)[steps - run :]
        guidance = Guidance(source, negative, cfg)
        model, cost = metered(model)
        return answer(cls, model, cost, *invert_obelm(model, guidance, samples, sigmas))
