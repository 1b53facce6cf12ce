"""The networks that judge pictures, from files in the host's model folders."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy.sd import CLIP
from comfy.sd1_clip import SDClipModel
from torch import Tensor, nn

from ..metrics.lpips import Lpips
from ..metrics.structure import DinoViT

FOLDER = "classifiers"
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
    for encoder in clip.cond_stage_model.modules():
        # Diffusion models read it unprojected; without a projection in its file the host's holds any numbers.
        if isinstance(encoder, SDClipModel) and not encoder.return_projected_pooled:
            projection = encoder.transformer.text_projection.weight.to(pooled)
            known = projection.shape[1] == pooled.shape[1] and 0 < float(projection.abs().max()) < 100
            pooled = pooled @ projection.T if known else None
            break
    if pooled is None:
        raise ValueError(
            "The CLIP has no projection of prompts to where pictures are, as in checkpoints of SD1.x: "
            "load a whole CLIP by Load CLIP."
        )
    return pooled


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
