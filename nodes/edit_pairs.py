"""The node that makes pairs of pictures to train an InstructPix2Pix on."""

from __future__ import annotations

import random
from collections.abc import Callable

import comfy.model_management
import comfy.sample
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io, ui
from torch import Tensor

from ..attention.edit_pairs import LEAST, Asked, Drawn, Likeness, Ranges, asked, pair, told, written
from ..attention.editing import prompt_to_prompt, rewrite
from ..host.files.pairs import Pairs
from ..host.files.trajectory import Trajectory
from ..host.run.cost import metered
from ..host.run.model import identity
from ..host.run.refusals import check_latent
from . import files
from .networks import check_halves, text_embedding
from .telling import SAYING, say, tell
from .widgets import fraction, seed_of

NODE = "Make Edit Pairs"
SHOWN = 16  # pairs that are handed on
CAPTIONS = (
    "a photo of a cat on a meadow | a photo of a dog on a meadow | make the cat a dog\n"
    "a photo of a house on a meadow | a photo of a house on a meadow at night | make it at night"
)
Compare = Callable[[Tensor, Tensor, Asked], Likeness]


class MakeEditPairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def scale(name: str, default: float, tooltip: str) -> io.Float.Input:
            return io.Float.Input(name, default=default, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=tooltip)

        def least(name: str, default: float, tooltip: str) -> io.Float.Input:
            return io.Float.Input(name, default=default, min=-1.0, max=1.0, step=0.01, tooltip=tooltip, advanced=True)

        return io.Schema(
            node_id="PalimpsestMakeEditPairs",
            display_name=NODE,
            category="Palimpsest/edit",
            description=(
                "InstructPix2Pix's data: makes pairs of pictures before and after an edit from pairs of captions, by "
                "Prompt-to-Prompt, and writes them with their instructions to a folder that training reads."
            ),
            search_aliases=[
                "instructpix2pix dataset",
                "training pairs",
                "edit dataset",
                "paired images",
                "generate training data",
                "ip2p data",
            ],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that makes both pictures, without edits."),
                io.Clip.Input("clip", tooltip="The CLIP that belongs to the model; it reads the captions."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model; it makes the pictures."),
                io.Latent.Input(
                    "latent",
                    tooltip="An empty latent: of the pictures' size, and of as many as are to be made at once.",
                ),
                io.String.Input(
                    "captions",
                    default=CAPTIONS,
                    multiline=True,
                    tooltip="One edit a line: caption, edited caption and instruction, between vertical bars.",
                ),
                io.Int.Input("samples", default=4, min=1, max=1000, tooltip="How many pairs to try for each line."),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps of each picture."),
                scale("cfg_from", 7.5, "The lowest guidance that is drawn. Paper: 7.5; 3 on the demo model."),
                scale("cfg_to", 15.0, "The highest. Paper: 15; 5 on the demo model."),
                fraction(
                    "shared_from", 0.1, "The least share of the run in which both pictures share attention. Paper: 0.1."
                ),
                fraction(
                    "shared_to",
                    0.9,
                    "The largest share. More keeps the first picture, and may miss the edit.",
                ),
                seed_of("Draws the noise, the guidance and the share of each pair."),
                io.String.Input(
                    "folder", default="edit-pairs", tooltip="In the output folder. Runs of other settings add to it."
                ),
                io.Clip.Input(
                    "filter_clip", optional=True, tooltip="A whole CLIP, from Load CLIP, to leave bad pairs out by."
                ),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="The picture half of the same CLIP, from Load CLIP Vision."
                ),
                least("least_image", LEAST.image, "Pairs whose pictures are less alike are left out. Paper: 0.75."),
                least("least_text", LEAST.text, "So are those that fit their captions less. Paper: 0.2."),
                least("least_direction", LEAST.direction, "And those whose change fits the words' less. Paper: 0.2."),
            ],
            outputs=[
                io.Image.Output("before", tooltip=f"The first pictures of the pairs, the last {SHOWN} of the run."),
                io.Image.Output("after", tooltip="The edited ones."),
                io.String.Output("instructions", tooltip="What was asked of each, a line a pair."),
            ],
            hidden=SAYING,
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        latent,
        captions,
        samples,
        steps,
        cfg_from,
        cfg_to,
        shared_from,
        shared_to,
        seed,
        folder,
        filter_clip=None,
        clip_vision=None,
        least_image=LEAST.image,
        least_text=LEAST.text,
        least_direction=LEAST.direction,
    ) -> io.NodeOutput:
        ranges = _ranges((shared_from, shared_to), (cfg_from, cfg_to))
        empty = comfy.sample.fix_empty_latent_channels(
            model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
        )
        check_latent(model, empty)
        wanted = asked(captions, "|", f"the captions of {NODE}")
        batches = [each for each in wanted for _ in range(-(-samples // len(empty)))]
        compare, least = _filter(filter_clip, clip_vision), Likeness(least_image, least_text, least_direction)
        own = identity(model)
        name = (own.name, own.prediction, own.weights.tolist())
        inputs = captions, samples, steps, ranges, seed, tuple(empty.shape), least if compare else None, name
        pairs = Pairs(files.folder(folder, NODE), *inputs)
        model, cost = metered(model)
        for number in range(pairs.done, len(batches)):
            comfy.model_management.throw_exception_if_processing_interrupted()
            drawn, each = Drawn.by(random.Random(f"{seed} {number}"), ranges), batches[number]
            before, after = _pictures(model, clip, vae, empty, steps, each, drawn)
            likeness = None if compare is None else compare(before, after, each)
            said = [told(each, drawn)] * len(empty)
            pairs.finish(number, written(pairs, number, before, after, said, likeness, least))
            say(cls, f"{len(pairs.lines)} pairs of {(number + 1) * len(empty)} tried.")
        lines, tried = pairs.lines, len(batches) * len(empty)
        if not lines:
            raise ValueError(
                f"{NODE} tried {tried} pairs and its CLIP left all of them out: lower least_image, least_text or "
                "least_direction, or raise samples."
            )
        report = f"{len(lines)} of {tried} pairs in {folder}. {cost.told}."
        said = "\n".join(line["instruction"] for line in lines[-SHOWN:])
        return tell(cls, *pairs.pictures(lines[-SHOWN:]), said, ui=ui.PreviewText(report))


def _ranges(share: tuple[float, float], cfg: tuple[float, float]) -> Ranges:
    for name, (least, most) in {"shared": share, "cfg": cfg}.items():
        if least > most:
            raise ValueError(
                f"{NODE} has {name}_from at {least:g} but {name}_to at {most:g}: raise {name}_to, or lower {name}_from."
            )
    return Ranges(share, cfg)


def _pictures(
    model: ModelPatcher, clip: CLIP, vae: VAE, empty: Tensor, steps: int, wanted: Asked, drawn: Drawn
) -> tuple[Tensor, Tensor]:
    """[b, h, w, 3] in 0..1 before and after."""
    source, target, edit = rewrite(clip, wanted.caption, wanted.edited)
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))

    def edited(trajectory: Trajectory) -> ModelPatcher:
        return prompt_to_prompt(model, trajectory, edit, drawn.settings)

    latents = pair(model, source, target, negative, drawn, empty, steps, edited)
    before, after = (vae.decode(latent)[..., :3] for latent in latents)
    return before, after


def _filter(clip: CLIP | None, clip_vision: ClipVisionModel | None) -> Compare | None:
    if clip is None and clip_vision is None:
        return None
    if clip is None or clip_vision is None:
        missing = "filter_clip" if clip is None else "clip_vision"
        raise ValueError(f"{NODE} filters by both halves of a CLIP, but {missing} is not connected: connect it.")

    def compare(before: Tensor, after: Tensor, wanted: Asked) -> Likeness:
        texts = [text_embedding(clip, text).cpu() for text in wanted[:2]]
        check_halves(texts[0].shape[1], clip_vision, NODE)
        pictures = [clip_vision.encode_image(side)["image_embeds"].cpu() for side in (before, after)]
        return Likeness.of(*pictures, *texts)

    return compare
