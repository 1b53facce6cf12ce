"""The node that measures an edit."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import comfy.model_management
import comfy.utils
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from comfy_api.latest import io, ui
from torch import Tensor, nn

from ..attention.heatmap import colored
from ..metrics.clip import clip_direction, clip_score
from ..metrics.comparison import comparison
from ..metrics.lpips import SMALLEST
from ..metrics.pixels import mse, psnr, ssim
from ..metrics.structure import structure_distance
from .networks import Missing, load_dino, load_lpips, text_embedding
from .telling import tell
from .widgets import drawn

WHOLE, INSIDE, OUTSIDE = "whole picture", "inside the mask", "outside the mask"
PSNR, SSIM, MSE, LPIPS = "PSNR", "SSIM", "MSE", "LPIPS"
STRUCTURE, SIMILARITY, DIRECTION = "Structure distance", "CLIP similarity", "CLIP direction"
FORMATS = {PSNR: "{:.2f} dB", SSIM: "{:.4f}", MSE: "{:.5f}", LPIPS: "{:.4f}"}
FORMATS |= {STRUCTURE: "{:.5f}", SIMILARITY: "{:.2f}", DIRECTION: "{:.3f}"}
GAIN = 4  # of the difference shown
CUT = 16  # pixels, more than any VAE cuts off a side

Values = dict[tuple[str, str], Tensor]
"""By metric and region, one for each picture."""


class EditMetrics(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestEditMetrics",
            display_name="Edit Metrics",
            category="Palimpsest/edit",
            description=(
                "Measures an edit: PSNR, SSIM and MSE of the whole picture and of both sides of a mask; LPIPS, "
                "structure distance and CLIP similarity where their models are there. Shows before, after and the "
                "difference."
            ),
            search_aliases=[
                "psnr",
                "ssim",
                "mse",
                "lpips",
                "clip score",
                "compare images",
                "before after",
                "image difference",
                "image quality metrics",
            ],
            inputs=[
                io.Image.Input("source", tooltip="The picture before the edit."),
                io.Image.Input("edited", tooltip="The picture after it, or a batch of edits of one source."),
                io.Image.Input(
                    "truth",
                    optional=True,
                    tooltip="What a perfect edit gives, if that is known: pixels are then measured against it.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="White where the edit should change the picture."),
                io.Clip.Input("clip", optional=True, tooltip="A whole CLIP, from Load CLIP, that reads the prompts."),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="The picture half of the same CLIP, from Load CLIP Vision."
                ),
                io.Combo.Input(
                    "region",
                    options=[WHOLE, INSIDE, OUTSIDE],
                    default=WHOLE,
                    tooltip="Where the outputs psnr, ssim, mse and lpips are measured. The text has all three.",
                ),
                io.String.Input("source_prompt", default="", tooltip="What the source shows, for clip_direction."),
                io.String.Input("target_prompt", default="", tooltip="What the edit should show, for CLIP."),
            ],
            outputs=[
                io.Image.Output("comparison", tooltip="Before, after, their difference, truth and mask in one row."),
                io.Float.Output("psnr", tooltip="Decibels; more is nearer. A mean over the batch, as all numbers are."),
                io.Float.Output("ssim", tooltip="Up to 1, which is the same picture."),
                io.Float.Output("mse", tooltip="Mean squared error of colours in 0 to 1."),
                io.Float.Output("lpips", tooltip="0 for what looks the same. NaN without its weights."),
                io.Float.Output("structure_distance", tooltip="0 for the same layout. NaN without its weights."),
                io.Float.Output(
                    "clip_similarity", tooltip="0 to 100: how well the edit fits target_prompt. NaN without a CLIP."
                ),
                io.Float.Output(
                    "clip_direction", tooltip="-1 to 1: how well the change fits the words' change. NaN without a CLIP."
                ),
                io.String.Output("report", tooltip="All of this as text."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        source,
        edited,
        region,
        source_prompt,
        target_prompt,
        truth=None,
        mask=None,
        clip=None,
        clip_vision=None,
    ) -> io.NodeOutput:
        if mask is None and region != WHOLE:
            raise ValueError(
                f"Edit Metrics is set to measure {region}, but no mask is connected: connect mask, or set region to "
                f"{WHOLE}."
            )
        edited = edited[..., :3]
        source = _beside(source[..., :3], edited, "source")
        truth = None if truth is None else _beside(truth[..., :3], edited, "truth")
        regions = {WHOLE: None}
        if mask is not None:
            inside = (drawn(_beside(mask[..., None], edited, "mask"))[..., 0] > 0.5).double()
            regions |= {INSIDE: inside, OUTSIDE: 1 - inside}
        values, notes = _measured(source, edited, source if truth is None else truth, regions)
        found, more = _clip_values(source, edited, clip, clip_vision, source_prompt, target_prompt)
        values |= found
        report = "\n".join([*_told(values, len(edited), truth is not None), *notes, *more])
        shown = _comparisons(source, edited, truth, regions, values)
        means = {key: float(value.mean()) for key, value in values.items()}
        regional = [means.get((name, region), math.nan) for name in (PSNR, SSIM, MSE, LPIPS)]
        others = [means.get((name, WHOLE), math.nan) for name in (STRUCTURE, SIMILARITY, DIRECTION)]
        seen = ui.PreviewImage(shown, cls=cls).as_dict() | ui.PreviewText(report).as_dict()
        return tell(cls, shown, *regional, *others, report, ui=seen)


def _beside(picture: Tensor, edited: Tensor, name: str) -> Tensor:
    """`picture` [b, h, w, c] in the edited one's size, cut as VAE Encode cuts it, and once for each edit.

    Raises ValueError for another size or number.
    """
    sizes = tuple(picture.shape[1:3]), tuple(edited.shape[1:3])
    if any(not 0 <= theirs - ours < CUT for theirs, ours in zip(*sizes, strict=True)):
        (height, width), (other_height, other_width) = sizes
        raise ValueError(
            f"Edit Metrics compares pictures of one size, but {name} is {width} x {height} and edited {other_width} x "
            f"{other_height} pixels: scale one of them."
        )
    for axis, (theirs, ours) in enumerate(zip(*sizes, strict=True), 1):
        picture = picture.narrow(axis, (theirs - ours) // 2, ours)
    if len(picture) not in (1, len(edited)):
        raise ValueError(
            f"Edit Metrics was given {len(edited)} edited pictures, but {name} holds {len(picture)}: connect one, or "
            "one for each."
        )
    return picture.expand(len(edited), -1, -1, -1)


def _measured(
    source: Tensor, edited: Tensor, reference: Tensor, regions: dict[str, Tensor | None]
) -> tuple[Values, list[str]]:
    """What is measured by pixels and networks, and a sentence for each network that is missing."""
    if min(edited.shape[1:3]) < SMALLEST:
        height, width = edited.shape[1:3]
        raise ValueError(
            f"Edit Metrics needs at least {SMALLEST} x {SMALLEST} pixels, but edited is {width} x {height}."
        )
    metrics, notes = {PSNR: psnr, SSIM: ssim, MSE: mse}, []
    lpips, dino = (_loaded(load, name, notes) for name, load in ((LPIPS, load_lpips), (STRUCTURE, load_dino)))
    if lpips is not None:
        metrics[LPIPS] = lpips
    progress = comfy.utils.ProgressBar(len(metrics) * len(regions) * len(edited) + len(edited))
    values = {
        (name, region): _each(metric, progress, reference, edited, *([] if where is None else [where]))
        for name, metric in metrics.items()
        for region, where in regions.items()
    }
    if dino is not None:
        values[STRUCTURE, WHOLE] = _each(partial(structure_distance, dino), progress, source, edited)
    return values, notes


def _loaded(load: Callable[[], nn.Module], name: str, notes: list[str]) -> nn.Module | None:
    try:
        return load()
    except Missing as missing:
        notes.append(f"{name} is not measured: {missing}.")
        return None


def _each(metric: Callable[..., Tensor], progress: comfy.utils.ProgressBar, *batches: Tensor) -> Tensor:
    """[b]: picture by picture, so that a large batch takes no more memory than one and can be interrupted."""
    device, found = comfy.model_management.get_torch_device(), []
    for rows in zip(*(batch.split(1) for batch in batches), strict=True):
        comfy.model_management.throw_exception_if_processing_interrupted()
        found.append(metric(*(row.to(device) for row in rows)).cpu())
        progress.update(1)
    return torch.cat(found)


def _clip_values(
    source: Tensor,
    edited: Tensor,
    clip: CLIP | None,
    clip_vision: ClipVisionModel | None,
    source_prompt: str,
    target_prompt: str,
) -> tuple[Values, list[str]]:
    if clip is None and clip_vision is None:
        return {}, []
    if clip is None or clip_vision is None:
        missing = "clip" if clip is None else "clip_vision"
        raise ValueError(f"Edit Metrics needs both halves of a CLIP, but {missing} is not connected: connect it.")
    if not target_prompt.strip():
        raise ValueError("Edit Metrics has no target_prompt for its CLIP: write what the edit should show.")
    target = text_embedding(clip, target_prompt)
    pictures = clip_vision.encode_image(edited)["image_embeds"]
    if pictures.shape[1] != target.shape[1]:
        raise ValueError(
            f"The halves of CLIP that Edit Metrics was given do not belong together: clip makes {target.shape[1]} "
            f"numbers of a prompt and clip_vision {pictures.shape[1]} of a picture. Load both from one CLIP."
        )
    values = {(SIMILARITY, WHOLE): clip_score(pictures, target)}
    if not source_prompt.strip():
        return values, [f"{DIRECTION} is not measured: source_prompt is empty."]
    before = clip_vision.encode_image(source)["image_embeds"]
    values[DIRECTION, WHOLE] = clip_direction(before, pictures, text_embedding(clip, source_prompt), target)
    return values, []


def _told(values: Values, pictures: int, against_truth: bool) -> list[str]:
    several = f", means of {pictures} pictures" if pictures > 1 else ""
    lines = [f"The edit against the {'truth' if against_truth else 'source'}{several}:"]
    for name in dict.fromkeys(name for name, _ in values):
        of = [(region, _number(name, value)) for (measured, region), value in values.items() if measured == name]
        lines.append(
            f"{name} " + ", ".join(number if region == WHOLE else f"{region} {number}" for region, number in of)
        )
    return lines


def _number(name: str, values: Tensor) -> str:
    mean = float(values.mean())
    return "not defined" if math.isnan(mean) else FORMATS[name].format(mean)


def _comparisons(
    source: Tensor, edited: Tensor, truth: Tensor | None, regions: dict[str, Tensor | None], values: Values
) -> Tensor:
    """[b, h, w, 3]: a row of pictures for each edit."""
    change = colored((GAIN * (edited - source).abs().mean(-1)).clamp(0, 1), None)
    named = {"before": source, "after": edited, f"difference, {GAIN} times": change}
    if truth is not None:
        named["truth"] = truth
    if INSIDE in regions:
        named["mask"] = regions[INSIDE].float()[..., None].expand(-1, -1, -1, 3)
    rows = []
    for i in range(len(edited)):
        told = [f"{name} {_number(name, values[name, WHOLE][i])}" for name in (PSNR, SSIM)]
        told += [f"{region} {_number(PSNR, values[PSNR, region][i])}" for region in regions if region == OUTSIDE]
        rows.append(comparison([(name, pictures[i]) for name, pictures in named.items()], "   ".join(told)))
    return torch.stack(rows)
