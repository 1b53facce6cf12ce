"""Edit Metrics: its numbers, its text, its picture, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from palimpsest.metrics.lpips import Lpips
from palimpsest.metrics.pixels import mse, psnr, ssim
from palimpsest.metrics.structure import DinoViT, structure_distance
from palimpsest.nodes.metrics import INSIDE, OUTSIDE, WHOLE, EditMetrics
from palimpsest.nodes.networks import DINO, HEADS, SQUEEZENET
from test_metrics import dino_weights, lpips_weights, random_vit
from tiny import execute

SOURCE, TARGET = "a photo of a red car on a street", "a photo of a blue car on a street"
OUTPUTS = [output.id for output in EditMetrics.GET_SCHEMA().outputs]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of networks that judge pictures; previews are written beside it."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "classifiers", ([str(tmp_path)], {""}))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path


@pytest.fixture
def edit() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    source = torch.rand(1, 64, 48, 3, generator=generator)
    mask = torch.zeros(1, 64, 48)
    mask[:, 16:40, 8:30] = 1
    noise = torch.randn(2, 64, 48, 3, generator=generator)
    edited = (source + noise * (0.05 + 0.3 * mask[..., None])).clamp(0, 1)
    return {"source": source, "edited": edited, "mask": mask}


def measured(**inputs: Any) -> dict[str, Any]:
    return dict(zip(OUTPUTS, execute(EditMetrics, **inputs), strict=True))


@pytest.mark.parametrize("region", [WHOLE, INSIDE, OUTSIDE])
def test_values_are_means_over_the_batch(folder: Path, edit: dict[str, Tensor], region: str) -> None:
    source, where = edit["source"].expand(2, -1, -1, -1), edit["mask"].expand(2, -1, -1).double()
    found = measured(**edit, region=region)
    counted = {WHOLE: None, INSIDE: where, OUTSIDE: 1 - where}[region]
    for name, metric in (("psnr", psnr), ("ssim", ssim), ("mse", mse)):
        assert found[name] == pytest.approx(float(metric(source, edit["edited"], counted).mean()), rel=1e-9)
    assert f"{found['psnr']:.2f} dB" in found["report"]
    assert math.isnan(found["lpips"])
    for name in (SQUEEZENET, DINO):
        assert f"is not measured: {name} is not in {folder}." in found["report"]


def test_truth_takes_the_source_s_place(folder: Path, edit: dict[str, Tensor]) -> None:
    truth = edit["edited"][:1]
    found = measured(**edit | {"edited": truth}, truth=truth)
    assert (found["psnr"], found["mse"]) == (math.inf, 0)
    assert "against the truth" in found["report"]


def test_networks_are_found_in_the_models_folder(folder: Path, edit: dict[str, Tensor]) -> None:
    network, heads = lpips_weights()
    dino = dino_weights(random_vit())
    for name, weights in ((SQUEEZENET, network), (HEADS, heads), (DINO, dino)):
        torch.save(weights, folder / name)
    found = measured(**edit, region=OUTSIDE)
    source, outside = edit["source"].expand(2, -1, -1, -1), 1 - edit["mask"].expand(2, -1, -1).double()
    lpips = Lpips()
    lpips.load(network, heads)
    expected = lpips.eval()(source, edit["edited"], outside).mean()
    assert found["lpips"] == pytest.approx(float(expected), rel=1e-5)
    expected = structure_distance(DinoViT(dino), source, edit["edited"]).mean()
    assert found["structure_distance"] == pytest.approx(float(expected), rel=1e-4)
    assert "not measured" not in found["report"]

    torch.save(heads, folder / DINO)
    with pytest.raises(ValueError, match=f"{DINO} does not hold the weights of DINO"):
        measured(**edit)


@pytest.fixture
def clip(demo: tuple) -> Iterator[CLIP]:
    """The demo model's text encoder with a projection, which it does not have."""
    clip = demo[1]
    weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    before = weight.clone()
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)))
    yield clip
    weight.copy_(before)


def test_clip(folder: Path, edit: dict[str, Tensor], clip: CLIP) -> None:
    projection = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    pooled = [clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)[1] for text in (SOURCE, TARGET)]
    texts = [each @ projection.T for each in pooled]
    ours, theirs, prepared = clip_vision(texts[0].shape[1])
    found = measured(**edit, clip=clip, clip_vision=ours, source_prompt=SOURCE, target_prompt=TARGET)
    source, edited = (theirs(prepared(edit[name])).image_embeds for name in ("source", "edited"))
    cosine = torch.cosine_similarity(edited, texts[1])
    assert found["clip_similarity"] == pytest.approx(float((100 * cosine).clamp_min(0).mean()), rel=2e-3)
    moved = edited / edited.norm(dim=-1, keepdim=True) - source / source.norm()
    said = texts[1] / texts[1].norm() - texts[0] / texts[0].norm()
    expected = torch.cosine_similarity(moved, said).mean()
    assert found["clip_direction"] == pytest.approx(float(expected), abs=5e-3)
    without = measured(**edit, clip=clip, clip_vision=ours, target_prompt=TARGET)
    assert math.isnan(without["clip_direction"])
    assert "CLIP direction is not measured: source_prompt is empty." in without["report"]


def test_halves_of_clip_that_do_not_fit(folder: Path, edit: dict[str, Tensor], clip: CLIP) -> None:
    weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    vision, other = (clip_vision(width)[0] for width in (len(weight), len(weight) // 2))
    for inputs, sentence in (
        ({"clip": clip, "target_prompt": TARGET}, "clip_vision is not connected"),
        ({"clip_vision": vision, "target_prompt": TARGET}, "clip is not connected"),
        ({"clip": clip, "clip_vision": vision}, "no target_prompt"),
        ({"clip": clip, "clip_vision": other, "target_prompt": TARGET}, "do not belong together"),
    ):
        with pytest.raises(ValueError, match=sentence):
            measured(**edit, **inputs)
    for never_loaded in (0, 1e30, math.nan):
        weight.fill_(never_loaded)
        with pytest.raises(ValueError, match="has no projection"):
            measured(**edit, clip=clip, clip_vision=vision, target_prompt=TARGET)


def clip_vision(width: int) -> tuple:
    """The same random weights in the host's class and in transformers', and what prepares pictures for the latter."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    sizes |= {"image_size": 32, "patch_size": 8, "projection_dim": width, "hidden_act": "quick_gelu"}
    theirs = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes)).eval()
    ours = ClipVisionModel(sizes | {"num_channels": 3, "model_type": "clip_vision_model", "layer_norm_eps": 1e-5})
    missing, unexpected = ours.load_sd(theirs.state_dict())
    assert not missing, unexpected

    def prepared(picture: Tensor) -> Tensor:
        planes = picture.movedim(-1, 1)
        scaled = torch.nn.functional.interpolate(planes, (43, 32), mode="bicubic", antialias=True)[:, :, 5:37]
        rounded = (255 * scaled).clamp(0, 255).round() / 255
        mean, deviation = torch.tensor(ours.image_mean), torch.tensor(ours.image_std)
        return (rounded - mean[:, None, None]) / deviation[:, None, None]

    return ours, theirs, prepared


def test_the_picture(folder: Path, edit: dict[str, Tensor]) -> None:
    """Before, after, difference and mask stand in a row, enlarged by whole pixels; a label is above, numbers below."""
    shown = measured(**edit)["comparison"]
    times, gap = 4, 8
    width, height = 48 * times, 64 * times
    assert shown.shape[0] == 2
    assert shown.shape[2] == 4 * (width + gap) + gap
    line = (shown.shape[1] - height) // 2

    def panel(i: int) -> Tensor:
        left = gap + i * (width + gap)
        return shown[:, line : line + height, left : left + width][:, ::times, ::times]

    assert (panel(0) - edit["source"]).abs().max() < 0.003
    assert (panel(1) - edit["edited"]).abs().max() < 0.003
    assert torch.equal(panel(3)[..., 0].round(), edit["mask"].expand(2, -1, -1))
    for strip in (shown[:, :line], shown[:, -line:]):
        assert (strip < 0.5).any()
        assert (strip > 0.99).float().mean() > 0.8
    again = measured(**edit)["comparison"]
    assert torch.equal(shown, again)


def test_source_of_another_size_than_the_vae_gives(folder: Path, edit: dict[str, Tensor]) -> None:
    """VAE Encode cuts what is no multiple of 8: the middle stays, and is compared."""
    wide = torch.nn.functional.pad(edit["source"], (0, 0, 3, 4, 2, 3))
    mask = torch.nn.functional.pad(edit["mask"], (3, 4, 2, 3))
    cut = measured(source=wide, edited=edit["edited"], mask=mask, region=INSIDE)
    assert cut["psnr"] == measured(**edit, region=INSIDE)["psnr"]


def test_refusals(folder: Path, edit: dict[str, Tensor]) -> None:
    for inputs, sentence in (
        ({"mask": None, "region": OUTSIDE}, "no mask is connected"),
        ({"source": edit["source"][:, :32]}, "source is 48 x 32 and edited 48 x 64"),
        ({"mask": edit["mask"][:, :, :20]}, "mask is 20 x 64 and edited 48 x 64"),
        ({"truth": edit["source"].repeat(3, 1, 1, 1)}, "2 edited pictures, but truth holds 3"),
        ({name: edit[name][:, :31, :31] for name in edit}, "at least 32 x 32 pixels, but edited is 31 x 31"),
    ):
        with pytest.raises(ValueError, match=sentence):
            measured(**edit | inputs)


def test_a_mask_without_pixels_is_said_to_have_no_value(folder: Path, edit: dict[str, Tensor]) -> None:
    found = measured(**edit | {"mask": 0 * edit["mask"]}, region=INSIDE)
    assert math.isnan(found["psnr"])
    assert f"{INSIDE} not defined" in found["report"]
