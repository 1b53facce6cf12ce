"""The networks that judge pictures, from files in the host's model folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from comfy.sd1_clip import SDClipModel
from torch import Tensor, nn

from ..metrics.lpips import Lpips
from ..metrics.structure import DinoViT

FOLDER = "classifiers"
UNPROJECTED = (
    "The CLIP has no projection of prompts to where pictures are, as in checkpoints of SD1.x: "
    "load a whole CLIP by Load CLIP."
)
SQUEEZENET, HEADS, DINO = "squeezenet1_1-b8a52dc0.pth", "lpips_squeeze.pth", "dino_vitbase8_pretrain.pth"


class Missing(Exception):
    """A sentence that names the file and its folder."""


def load_lpips() -> Lpips:
    """Raises Missing without the files, ValueError where they hold something else."""
    network, heads = _found(SQUEEZENET), _found(HEADS)
    model = Lpips()
    try:
        model.load(_weights(network), _weights(heads))
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"{network} and {heads} do not hold the weights of LPIPS: {SQUEEZENET} is torchvision's, {HEADS} the "
            "squeeze.pth of LPIPS 0.1."
        ) from error
    return _placed(model)


def load_dino() -> DinoViT:
    """Raises Missing without the file, ValueError where it holds something else."""
    path = _found(DINO)
    try:
        model = DinoViT(_weights(path))
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path} does not hold the weights of DINO ViT-B/8 as its authors publish them.") from error
    return _placed(model)


def text_embedding(clip: CLIP, prompt: str) -> Tensor:
    """[1, c]. Raises ValueError for a text encoder that makes none."""
    _, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    for encoder in _encoders(clip):
        if not encoder.return_projected_pooled:  # diffusion models read it unprojected
            projection = _projection(encoder)
            fits = projection is not None and projection.shape[1] == pooled.shape[1]
            pooled = pooled @ projection.to(pooled).T if fits else None
            break
    if pooled is None:
        raise ValueError(UNPROJECTED)
    return pooled


def text_projection(clip: CLIP) -> Tensor:
    """[n, c]: from what a token of a prompt is to a diffusion model, to where pictures are.

    Raises ValueError as `text_embedding`.
    """
    projection = next(map(_projection, _encoders(clip)), None)
    if projection is None:
        raise ValueError(UNPROJECTED)
    return projection


def check_halves(width: int, clip_vision: ClipVisionModel, node: str) -> None:
    """Raises ValueError where embeddings of prompts, of `width`, are not of the CLIP that looks at the pictures."""
    seen = clip_vision.config.get("projection_dim")
    if seen is None:
        raise ValueError(
            f"The clip_vision of {node} makes no embedding that prompts have too, as SigLIP and DINO: load the picture "
            "half of a CLIP by Load CLIP Vision."
        )
    if width != seen:
        raise ValueError(
            f"The clip of {node} makes {width} numbers of a prompt and clip_vision {seen} of a picture: load both from "
            "one CLIP."
        )


def _encoders(clip: CLIP) -> Iterator[SDClipModel]:
    return (module for module in clip.cond_stage_model.modules() if isinstance(module, SDClipModel))


def _projection(encoder: SDClipModel) -> Tensor | None:
    """[n, c]; None where the encoder has none, or its file had none, which leaves any numbers in the host's."""
    layer = getattr(encoder.transformer, "text_projection", None)
    known = layer is not None and 0 < float(layer.weight.abs().max()) < 100
    return layer.weight if known else None


def _found(name: str) -> Path:
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise Missing(f"{name} is not in {folder_paths.get_folder_paths(FOLDER)[0]}")
    return Path(path)


def _weights(path: Path) -> dict:
    return comfy.utils.load_torch_file(str(path), safe_load=True)


def _placed(model: nn.Module) -> nn.Module:
    device = comfy.model_management.get_torch_device()
    size = comfy.model_management.module_size(model)
    comfy.model_management.free_memory(3 * size, device)
    return model.eval().requires_grad_(False).to(device)
