"""Nodes that find directions in h-space, the features that a UNet decodes, and sample along them."""

from __future__ import annotations

import comfy.sample
from comfy_api.latest import io, ui

from ..guidance.h_features import PROMPTS, TRAJECTORIES, direction_of_prompts, direction_of_trajectories
from ..guidance.h_space import APPLY, HDirection, Moves
from ..host.branch.asymmetric import attach_moves
from ..host.run.cost import metered
from ..host.run.refusals import check_no_mask
from ..inversion.run import ddim_sigmas
from . import files, sockets
from .direction import SENTENCES
from .telling import HIDDEN, tell
from .widgets import check_window, fraction, saved_file, saved_name, seed_of


def block_of() -> io.Int.Input:
    """Which features a direction is in."""
    return io.Int.Input(
        "block",
        default=0,
        min=0,
        max=100,
        tooltip="Before which output block: 0 is the middle block's output, the paper's; the demo model needs 5.",
    )


FOUND = sockets.HDirection.Output("h_direction", tooltip="The direction, for Apply H Space Direction.")


class HSpaceDirectionFromPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def lines(name: str, default: str, tooltip: str) -> io.String.Input:
            return io.String.Input(name, default=default, multiline=True, dynamic_prompts=False, tooltip=tooltip)

        return io.Schema(
            node_id="PalimpsestHSpaceDirectionFromPrompts",
            display_name=PROMPTS,
            category="Palimpsest/edit",
            description=(
                "What turns one kind of image into another inside the model: images of both kinds are sampled, and the "
                "mean output of the UNet's middle block for one is taken from that for the other, at each noise level. "
                "Apply H Space Direction edits any image along it."
            ),
            search_aliases=["h-space", "asyrp", "semantic direction", "latent direction", "middle block", "bottleneck"],
            inputs=[
                io.Model.Input("model", tooltip="The model that edits, without edits. SD1.x, SD2.x or SDXL."),
                io.Clip.Input("clip", tooltip="The text encoder of that model."),
                lines("source", "a photo of a red car on a street", "What to edit: one word or sentence a line."),
                lines("target", "a photo of a red car on a street at night", "What it should become: one a line."),
                io.Combo.Input(
                    "sentences",
                    options=list(SENTENCES),
                    tooltip=(
                        "as written: every line is a sentence. templates: every line is a thing, such as cat, put into "
                        "some dozens of sentences. demo captions: it is part of a Demo Scene caption, such as red car."
                    ),
                ),
                io.Latent.Input("latent_image", tooltip="An empty latent as large as the images to edit."),
                io.Int.Input(
                    "images",
                    default=10,
                    min=1,
                    max=1000,
                    tooltip="How many are sampled of either kind. The sentences are spread over them.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=999,
                    tooltip="At how many noise levels it is known: those of DDIM Inversion with as many steps.",
                ),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly the images follow their sentence: 7.5 for SD1.5, 3 to 5 for the demo model.",
                ),
                seed_of("The seed of the noise that both kinds are sampled from."),
                block_of(),
            ],
            hidden=HIDDEN,
            outputs=[FOUND],
        )

    @classmethod
    def execute(
        cls, model, clip, source, target, sentences, latent_image, images, steps, cfg, seed, block
    ) -> io.NodeOutput:
        if clip is None:
            raise ValueError(f"{PROMPTS} got no CLIP: the checkpoint holds no text encoder; load one with Load CLIP.")
        check_no_mask(latent_image, PROMPTS)
        samples = comfy.sample.fix_empty_latent_channels(
            model, latent_image["samples"], latent_image.get("downscale_ratio_spacial")
        )
        noise = comfy.sample.prepare_noise(samples[:1].expand(images, *samples.shape[1:]), seed)

        def encoded(text: str) -> list:
            return clip.encode_from_tokens_scheduled(clip.tokenize(text))

        def spread(side: str, typed: str) -> list:
            lines = [line.strip() for line in typed.splitlines() if line.strip()]
            if not lines:
                raise ValueError(f"The {side} list of {PROMPTS} is empty: type a word or sentence a line.")
            found = [sentence for line in lines for sentence in SENTENCES[sentences](line)]
            return [encoded(found[i * len(found) // images]) for i in range(images)]

        sides = spread("source", source), spread("target", target)
        model, cost = metered(model)
        direction = direction_of_prompts(model, *sides, encoded(""), cfg, ddim_sigmas(model, steps), noise, block)
        return tell(cls, direction, ui=ui.PreviewText(f"{cost.told}."))


class HSpaceDirectionFromTrajectories(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestHSpaceDirectionFromTrajectories",
            display_name=TRAJECTORIES,
            category="Palimpsest/edit",
            description=(
                "H Space Direction from Prompts for two batches of images of your own, with and without what is to be "
                "added: each batch inverted by DDIM Inversion, or sampled by Record Trajectory."
            ),
            search_aliases=["h-space", "asyrp", "direction from images", "image pairs", "middle block", "bottleneck"],
            inputs=[
                io.Model.Input("model", tooltip="The model that made both trajectories, without edits."),
                sockets.Trajectory.Input("source", tooltip="Images of what is to be edited, one or a batch."),
                sockets.Trajectory.Input(
                    "target", tooltip="Images of what it should become, along the same schedule and of the same size."
                ),
                block_of(),
            ],
            hidden=HIDDEN,
            outputs=[FOUND],
        )

    @classmethod
    def execute(cls, model, source, target, block) -> io.NodeOutput:
        model, cost = metered(model)
        direction = direction_of_trajectories(model, source, target, block)
        return tell(cls, direction, ui=ui.PreviewText(f"{cost.told}."))


class ApplyHSpaceDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestApplyHSpaceDirection",
            display_name=APPLY,
            category="Palimpsest/edit",
            description=(
                "Asyrp: moves what the UNet's middle block gives along a direction, in the part of each step that "
                "predicts the image, and leaves the part that keeps the noise as it is. The prompt stays the source's. "
                "Sample the returned MODEL with Edit Sampler, or any sampler set to euler, ddim or euler_ancestral."
            ),
            search_aliases=["h-space edit", "asyrp", "asymmetric reverse process", "semantic edit", "bottleneck edit"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with, edited or not."),
                sockets.HDirection.Input("h_direction", tooltip="Where to: made with the same model."),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.05,
                    tooltip="How far. 0 leaves the model as it is; a negative one is the way back.",
                ),
                fraction("start", 0.0, "From which part of the run on it is applied."),
                fraction("end", 0.5, "Until where. Each step within costs one more row an image."),
                fraction("boost", 1.0, "From where on each step adds noise, against flaws. Paper: 0.8; 1 adds none."),
            ],
            outputs=[io.Model.Output("model", tooltip="The model whose samples are edited.")],
        )

    @classmethod
    def execute(cls, model, h_direction, scale, start, end, boost) -> io.NodeOutput:
        if scale == 0:
            return io.NodeOutput(model)
        check_window(APPLY, start, end)
        return io.NodeOutput(attach_moves(model, Moves(h_direction, scale, start, end, boost)))


class SaveHSpaceDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestSaveHSpaceDirection",
            display_name="Save H Space Direction",
            category="Palimpsest/edit",
            description="Writes an h-space direction to the output folder, so that it need be made only once.",
            search_aliases=["export h-space direction", "keep h-space direction"],
            is_output_node=True,
            inputs=[
                sockets.HDirection.Input(
                    "h_direction", tooltip="What to write: 6.6 MB for a 512 pixel image of SD1.5 at 20 steps."
                ),
                saved_name("directions/h-space"),
            ],
            outputs=[sockets.HDirection.Output("h_direction", tooltip="The same direction, to go on with.")],
        )

    @classmethod
    def execute(cls, h_direction, filename_prefix) -> io.NodeOutput:
        path, shown = files.fresh(filename_prefix, "Save H Space Direction")
        h_direction.save(path)
        return tell(cls, h_direction, ui={"text": [shown]})


class LoadHSpaceDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLoadHSpaceDirection",
            display_name="Load H Space Direction",
            category="Palimpsest/edit",
            description=(
                "Reads an h-space direction that Save H Space Direction wrote, from the output or the input folder."
            ),
            search_aliases=["import h-space direction"],
            inputs=[saved_file()],
            outputs=[FOUND],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        return files.verdict(file, "Load H Space Direction")

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return files.version(file, "Load H Space Direction")

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(HDirection.load(files.existing(file, "Load H Space Direction")))
