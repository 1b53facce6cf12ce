"""The node that finds the values of cross-attention by which guided sampling reconstructs an image."""

from __future__ import annotations

import comfy.samplers
import torch
from comfy_api.latest import io

from ..host.run.cost import metered
from ..host.run.model import noise_latent
from ..inversion.error_plot import error_plot
from ..inversion.null_text import check_pivot, distances
from ..inversion.run import Guidance, record
from ..inversion.value_inversion import NODE, Settings, check, value_inversion
from . import sockets
from .telling import HIDDEN, tell
from .widgets import spent

PAPER = Settings()


class ValueInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestValueInversion",
            display_name=NODE,
            category="Palimpsest/invert",
            description=(
                "Optimises what the source prompt's words show in the image, not where they look, until sampling at "
                "the edit's guidance comes back to it. After StyleDiffusion, but for its network, in place of which "
                "the embedding itself is fitted. P2P Attention Controller gives it to the words that both prompts have."
            ),
            search_aliases=[
                "stylediffusion",
                "style diffusion",
                "value optimization",
                "prompt-embedding inversion",
                "optimize prompt embedding",
                "reconstruct at cfg",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that made the trajectory, without edits."),
                sockets.Trajectory.Input("trajectory", tooltip="The image, from DDIM Inversion at cfg 1."),
                io.Conditioning.Input("negative", tooltip="The negative prompt of the edit, usually an empty one."),
                io.Float.Input(
                    "cfg",
                    default=PAPER.cfg,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="The guidance of the edit: the values fit this one only. Set the sampler to the same.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=PAPER.inner_steps,
                    min=0,
                    max=500,
                    tooltip=(
                        "Updates of the first step at most; a later one has fewer, by a tenth each. More reconstruct "
                        "better and take longer. 0 leaves the prompt's values as they are."
                    ),
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
                    tooltip="A step is good enough at this loss; 0.00002 is added with every step.",
                ),
                io.Float.Input(
                    "map_weight",
                    default=PAPER.map_weight,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="How much it counts that the words look where they do in the inversion. 0 leaves it out.",
                ),
                io.Int.Input(
                    "map_side",
                    default=PAPER.map_side,
                    min=1,
                    max=1024,
                    advanced=True,
                    tooltip=(
                        "Positions a side of the attention layers whose maps are compared. Paper: 16, at 512 pixels; "
                        "32 for SDXL at 1024."
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
                sockets.Trajectory.Output(
                    "trajectory", tooltip="The reconstruction, with the values: the source for the edit nodes."
                ),
                io.Image.Output("error", tooltip="A plot: how far each step is from the image, before and after."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        trajectory,
        negative,
        cfg,
        inner_steps,
        learning_rate,
        early_stop,
        map_weight,
        map_side,
        checkpointing,
    ) -> io.NodeOutput:
        settings = Settings(cfg, inner_steps, learning_rate, early_stop, map_weight, map_side)
        model, cost = metered(model)
        check(model, trajectory, negative)
        check_pivot(model, trajectory, NODE)
        # The plot's other curve comes first: an interrupt later on loses nothing.
        noise = noise_latent(model, trajectory)
        guidance = Guidance(trajectory.conditioning, negative, cfg)
        euler = comfy.samplers.sampler_object("euler")
        plain, _ = record(model, guidance, euler, trajectory.sigmas, torch.zeros_like(noise), noise, seed=0)
        found = value_inversion(model, trajectory, negative, settings, checkpointing)
        curves = {f"the prompt's values at cfg {cfg:g}": plain, "optimised": found}
        plot = error_plot({name: distances(path, trajectory) for name, path in curves.items()})
        return tell(cls, found, plot, ui=spent(cost, found, model))
