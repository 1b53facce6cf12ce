"""Nodes that change how predictions are combined: negative prompts, proximal guidance, and Uni-Edit's."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider
from comfy_api.latest import io

from ..guidance.negative_prompt import NPI, PRESETS, SCHEDULES, Mixture
from ..guidance.proximal import INVERSION, PULLS, Proximal
from ..guidance.uni_edit import NODE as UNI_EDIT
from ..guidance.uni_edit import UniEdit
from ..host.branch.guided import attach_rule
from ..host.branch.negatives import attach_mixture
from ..host.files.trajectory import Trajectory
from . import sockets
from .widgets import fraction

CUSTOM = "custom"
EMPTY = io.Conditioning.Input("empty", tooltip="An empty prompt: CLIP Text Encode without a text.")


def _mixture_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "preset",
            options=[CUSTOM, *PRESETS],
            default=CUSTOM,
            tooltip=(
                "Settings of the literature, in place of alpha and schedule. Negative-prompt inversion is the source "
                "prompt as negative throughout: connect trajectory."
            ),
        ),
        fraction(
            "alpha",
            1.0,
            "How much of the empty prompt there is at the start; the rest is the negative. Lower: stronger negative.",
        ),
        io.Combo.Input(
            "schedule",
            options=list(SCHEDULES),
            default=SCHEDULES[1],
            tooltip="How alpha goes on: it stays, falls to 0 in a line, or falls fast. The negative grows as it falls.",
        ),
        sockets.Trajectory.Input(
            "trajectory",
            optional=True,
            tooltip="The source image: its prompt becomes the negative, in place of the sampler's.",
        ),
    ]


class NegativePromptGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestNegativePromptGuidance",
            display_name="Negative Prompt Guidance",
            category="Palimpsest/guide",
            description=(
                "Plug-and-Play's negative prompt: guidance starts from the empty prompt and moves over to the negative "
                "one during the run, so that the source's look can be left behind. Sample the returned MODEL."
            ),
            search_aliases=["negative prompt schedule", "negative prompt inversion", "npi", "plug and play negative"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with, edited or not."),
                EMPTY,
                *_mixture_inputs(),
            ],
            outputs=[io.Model.Output("model", tooltip="The model for any sampler with a negative prompt.")],
        )

    @classmethod
    def execute(cls, model, empty, preset, alpha, schedule, trajectory=None) -> io.NodeOutput:
        return io.NodeOutput(_mixed(model, empty, preset, Mixture(alpha, schedule), trajectory))


class NegativePromptGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestNegativePromptGuider",
            display_name="Negative Prompt Guider",
            category="Palimpsest/guide",
            description="Negative Prompt Guidance as a guider, for SamplerCustomAdvanced.",
            search_aliases=["negative prompt schedule", "negative prompt inversion", "npi", "guider"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with, edited or not."),
                io.Conditioning.Input("positive", tooltip="What the image should show: Prompt Edit's target output."),
                io.Conditioning.Input("negative", tooltip="What it should not show; the trajectory's prompt if given."),
                EMPTY,
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly the image follows the prompt: 7.5 for SD1.5, 3 to 5 for the demo model.",
                ),
                *_mixture_inputs(),
            ],
            outputs=[io.Guider.Output("guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, empty, cfg, preset, alpha, schedule, trajectory=None) -> io.NodeOutput:
        guider = CFGGuider(_mixed(model, empty, preset, Mixture(alpha, schedule), trajectory))
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider)


def _mixed(
    model: ModelPatcher, empty: list, preset: str, mixture: Mixture, trajectory: Trajectory | None
) -> ModelPatcher:
    if preset == NPI and trajectory is None:
        raise ValueError(f"The preset {preset} takes the source prompt from a trajectory: connect the trajectory.")
    return attach_mixture(model, empty, PRESETS.get(preset, mixture), trajectory)


class ProximalGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestProximalGuidance",
            display_name="Proximal Guidance",
            category="Palimpsest/guide",
            description=(
                "Keeps guidance to where the prompts really differ: weak differences between positive and negative "
                "are dropped, so that the rest of the image stays as it was. Made for the source prompt as negative."
            ),
            search_aliases=["proxedit", "proximal", "soft threshold guidance", "background preservation"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with, edited or not."),
                fraction("quantile", 0.4, "The share of the differences that is dropped. 0 switches this off."),
                sockets.Trajectory.Input(
                    "trajectory", optional=True, tooltip="The source image, to pull what is unchanged back to."
                ),
                fraction("pull", 1.0, "How far the unchanged parts go to the source in a step; needs the trajectory."),
                fraction("pull_start", 0.6, "From where in the run on they are pulled.", advanced=True),
                io.Combo.Input(
                    "pull_to",
                    options=list(PULLS),
                    default=INVERSION,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "inversion: to the source's own latent at that step. reconstruction: as far as the denoised "
                        "estimate is from the source image, for a pull of 0.1 or so."
                    ),
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model for any sampler with a negative prompt.")],
        )

    @classmethod
    def execute(cls, model, quantile, pull, pull_start, trajectory=None, pull_to=INVERSION) -> io.NodeOutput:
        if quantile == 0:
            return io.NodeOutput(model)
        return io.NodeOutput(attach_rule(model, Proximal(quantile, pull, pull_start, pull_to), trajectory))


class UniEditGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestUniEditGuidance",
            display_name=UNI_EDIT,
            category="Palimpsest/guide",
            description=(
                "Uni-Edit: guides most where the new prompt and the source prompt see different things, and least "
                "where they agree, so that the rest of the image stays. Made for DDIM Inversion at a strength of 0.6 "
                "to 0.8 with an empty prompt, and the source prompt as the sampler's negative. For Flux and other flow "
                "models, and for SD1.5 and SDXL too."
            ),
            search_aliases=["uni-edit", "uniedit-flow", "region guidance", "velocity fusion"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with, edited or not."),
                fraction(
                    "amount",
                    1.0,
                    "How much more guidance there is where the prompts differ more. 0 is plain guidance at the "
                    "sampler's cfg; 1 is Uni-Edit, whose omega that cfg is: 5.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model for any sampler with the source prompt as its negative.")
            ],
        )

    @classmethod
    def execute(cls, model, amount) -> io.NodeOutput:
        return io.NodeOutput(attach_rule(model, UniEdit(amount)) if amount else model)
