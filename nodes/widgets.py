"""Inputs and outputs that several nodes have in common."""

from __future__ import annotations

import logging

from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io, ui
from torch import Tensor

from ..host.files.trajectory import EULER, Trajectory
from ..host.run.cost import Cost
from ..host.run.model import noise_latent, told_many_steps
from ..host.run.refusals import check_no_mask
from . import files

GREY_LEVEL = 1 / 255


def fraction(name: str, default: float, tooltip: str, advanced: bool = False) -> io.Float.Input:
    """A number from 0 to 1."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip, advanced=advanced)


def check_window(what: str, start: float, end: float, names: tuple[str, str] = ("start", "end")) -> None:
    """Raises ValueError for a part of the run that is empty by the numbers of two widgets of those names."""
    if start >= end:
        raise ValueError(f"{what} is to end at {end:g} but starts at {start:g}: raise {names[1]}, or lower {names[0]}.")


def seed_of(tooltip: str) -> io.Int.Input:
    """Of noise, or of what else is drawn at random; it stays as it is between runs."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=io.ControlAfterGenerate.fixed,
        tooltip=tooltip,
    )


def image_to_invert() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model to invert with: the same one that you edit with, without edits."),
        io.Conditioning.Input(
            "source", tooltip="The prompt that says what the image shows: Prompt Edit's source output."
        ),
        io.MultiType.Input(
            "image", [io.Latent, io.Image], tooltip="The image or batch of images, beside vae or from VAE Encode."
        ),
    ]


def encoder() -> io.Vae.Input:
    """What encodes an image that is no latent yet."""
    return io.Vae.Input(
        "vae", optional=True, tooltip="The VAE that belongs to the model; not needed where image is a latent."
    )


def latent_of(image: dict | Tensor, vae: VAE | None, node: str) -> Tensor:
    """[b, c, h, w]: a LATENT's samples, or what VAE Encode makes of an IMAGE.

    Raises ValueError for an image without a VAE, and for a latent with a noise mask.
    """
    latent = encoded(image, vae, node)
    check_no_mask(latent, node)
    return latent["samples"]


def encoded(image: dict | Tensor, vae: VAE | None, node: str) -> dict:
    """A LATENT as it is, or what VAE Encode makes of an IMAGE. Raises ValueError for an image without a VAE."""
    if isinstance(image, dict):
        return image
    if vae is None:
        raise ValueError(f"{node} was given an image but no vae: connect vae, or VAE Encode in between.")
    return {"samples": vae.encode(image)}


def inverting_negative() -> io.Input:
    return io.Conditioning.Input(
        "negative", optional=True, tooltip="Negative prompt while inverting; needed where cfg is not 1."
    )


def saved_name(default: str) -> io.String.Input:
    """Where a node writes to."""
    return io.String.Input(
        "filename_prefix",
        default=default,
        tooltip="File name in the output folder, folders allowed; a number is added.",
    )


def saved_file() -> io.Combo.Input:
    """What a node reads from."""
    return io.Combo.Input(
        "file",
        options=files.listed(),
        tooltip="A file of the input folder, or of the output folder where it ends in [output].",
    )


def noise_and_sigmas() -> list[io.Output]:
    """What a sampler takes from a trajectory."""
    return [
        io.Latent.Output("noise", tooltip="The inverted noise: latent_image of the sampler, add_noise disabled."),
        io.Sigmas.Output("sigmas", tooltip="The schedule, for SamplerCustom."),
    ]


def noise_and_sigmas_of(model: ModelPatcher, trajectory: Trajectory) -> tuple[dict, Tensor]:
    """These outputs. Copies: a sampler may write to the sigmas that it is given."""
    return {"samples": noise_latent(model, trajectory)}, trajectory.sigmas.clone()


def spent(cost: Cost, trajectory: Trajectory, model: ModelPatcher, warning: str | None = None) -> ui.PreviewText:
    """What a node's runs cost and how large what they made is, for the frontend to show under the node.

    Also which sampler that was inverted for, where it is not the usual one, and what there is to warn of.
    """
    told = [f"{cost.told}; trajectory {trajectory.bytes / 2**20:,.1f} MB."]
    if trajectory.sampler != EULER:
        told.append(f"Sampler: {trajectory.sampler}.")
    for told_too in filter(None, (warning, told_many_steps(model, trajectory.steps))):
        logging.warning(f"Palimpsest: {told_too}")
        told.append(told_too)
    return ui.PreviewText(" ".join(told))


def drawn(mask: Tensor) -> Tensor:
    """A mask [..., h, w] as whoever drew it means it: what is one level of grey from black or white is black or white.

    The host loads 8-bit grey pictures as v / 256, and their white as 0.996.
    """
    return ((mask - GREY_LEVEL) / (1 - 2 * GREY_LEVEL)).clamp(0, 1)
