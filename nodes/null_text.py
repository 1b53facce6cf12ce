"""The node that finds the negatives by which guided sampling reconstructs an image."""

from __future__ import annotations

import comfy.samplers
import torch
from comfy_api.latest import io

from ..host.run.cost import metered
from ..host.run.model import noise_latent
from ..inversion.error_plot import error_plot
from ..inversion.null_text import Settings, check, check_pivot, distances, null_text
from ..inversion.run import Guidance, record
from . import sockets
from .telling import HIDDEN, tell
from .widgets import spent

PAPER = Settings()
EMPTY, SOURCE = "empty prompt", "source prompt"


class NullTextInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestNullTextInversion",
            display_name="Null Text Inversion",
            category="Palimpsest/invert",
            description=(
                "Optimises the negative prompt's embedding, step by step, until sampling at the edit's guidance comes "
                "back to the image. Use the negative in place of an empty one, and the trajectory as the edit's source."
            ),
            search_aliases=[
                "null-text optimization",
                "nti",
                "negative prompt inversion",
                "optimize negative",
                "reconstruct at cfg",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that made the trajectory, without edits."),
                sockets.Trajectory.Input("trajectory", tooltip="The image, from DDIM Inversion at cfg 1."),
                io.Conditioning.Input("empty", tooltip="An empty prompt: where the negatives begin."),
                io.Float.Input(
                    "cfg",
                    default=PAPER.cfg,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="The guidance of the edit: the negatives fit this one only. Set the sampler to the same.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=PAPER.inner_steps,
                    min=1,
                    max=500,
                    tooltip="Updates a step at most. More reconstruct better and take longer.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=PAPER.learning_rate,
                    min=0.0001,
                    max=1.0,
                    step=0.0001,
                    tooltip="How far one update goes; it falls by a hundredth of this with every step.",
                ),
                io.Float.Input(
                    "early_stop",
                    default=PAPER.early_stop,
                    min=0.0,
                    max=1.0,
                    step=0.000001,
                    tooltip="A step is good enough at this mean squared error; 0.00002 is added with every step.",
                ),
                io.Combo.Input(
                    "start_from",
                    options=[EMPTY, SOURCE],
                    default=EMPTY,
                    tooltip=(
                        "The empty prompt, as in the paper; or the source prompt, which reconstructs at once, takes "
                        "few updates, and leaves less room to edit."
                    ),
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=True,
                    advanced=True,
                    tooltip="Runs every block twice to save memory. Off is faster, where memory is plenty.",
                ),
            ],
            hidden=HIDDEN,
            outputs=[
                io.Conditioning.Output(
                    "negative", tooltip="The negatives, one for each step: negative of the edit's sampler."
                ),
                sockets.Trajectory.Output(
                    "trajectory", tooltip="The reconstruction that they give: the source for the edit nodes."
                ),
                io.Image.Output("error", tooltip="A plot: how far each step is from the image, before and after."),
            ],
        )

    @classmethod
    def execute(
        cls, model, trajectory, empty, cfg, inner_steps, learning_rate, early_stop, start_from, checkpointing
    ) -> io.NodeOutput:
        settings = Settings(cfg, inner_steps, learning_rate, early_stop)
        model, cost = metered(model)
        check(model, trajectory, empty, settings)  # the plot samples with it, wherever the negatives begin
        check_pivot(model, trajectory)
        # The plot's other curve comes first: an interrupt later on loses nothing.
        noise = noise_latent(model, trajectory)
        guidance = Guidance(trajectory.conditioning, empty, cfg)
        euler = comfy.samplers.sampler_object("euler")
        plain, _ = record(model, guidance, euler, trajectory.sigmas, torch.zeros_like(noise), noise, seed=0)
        start = empty if start_from == EMPTY else trajectory.conditioning
        negative, found = null_text(model, trajectory, start, settings, checkpointing)
        curves = {f"empty negative at cfg {cfg:g}": plain, "optimised": found}
        plot = error_plot({name: distances(path, trajectory) for name, path in curves.items()})
        return tell(cls, negative, found, plot, ui=spent(cost, found, model))
