"""Masks as people draw them: pictures through the host's own loaders into every node that takes a MASK."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import nodes as host_nodes
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from palimpsest.host.branch.source import KEY
from palimpsest.nodes.blend import LocalBlendNode
from palimpsest.nodes.extension import NODES
from palimpsest.nodes.inject import MasaCtrlNode
from palimpsest.nodes.metrics import INSIDE, EditMetrics
from palimpsest.nodes.widgets import drawn
from tiny import Tiny, execute

# How a picture is saved: its mode, its file type, and the channel that is the mask.
PICTURES = [
    *(("L", kind, "red") for kind in ("png", "jpg", "webp")),
    ("LA", "png", "red"),
    ("RGB", "png", "red"),
    ("I;16", "png", "red"),
    ("1", "png", "red"),
    ("LA", "png", "alpha"),
    ("RGBA", "png", "alpha"),
]


def loaded(picture: np.ndarray, folder: Path, monkeypatch, mode: str = "L", kind: str = "png", channel="red") -> Tensor:
    """The MASK that the host makes of a grey picture [h, w], 0 to 255. As alpha it is saved erased: 0 is the mask."""
    grey = Image.fromarray(picture)
    if mode == "I;16":
        grey = Image.fromarray(picture.astype(np.uint16) * 257)
    elif channel == "alpha":
        grey = Image.merge(mode, [grey] * (len(mode) - 1) + [Image.fromarray(255 - picture)])
    else:
        grey = grey.convert(mode)
    grey.save(folder / f"mask.{kind}", **({"lossless": True} if kind == "webp" else {"quality": 100}))
    monkeypatch.setattr(folder_paths, "input_directory", str(folder))
    (mask,) = host_nodes.LoadImageMask().load_image_mask(f"mask.{kind}", channel)
    return mask


def half_white(size: int = 64) -> np.ndarray:
    picture = np.zeros((size, size), np.uint8)
    picture[:, : size // 2] = 255
    return picture


@pytest.mark.parametrize(("mode", "kind", "channel"), PICTURES)
def test_black_is_0_and_white_is_1(mode: str, kind: str, channel: str, tmp_path: Path, monkeypatch) -> None:
    mask = drawn(loaded(half_white(), tmp_path, monkeypatch, mode, kind, channel))
    assert torch.equal(mask, torch.from_numpy(half_white() / 255).float()[None])


@pytest.mark.parametrize(("mode", "kind", "channel"), [p for p in PICTURES if p[0] != "1"])
def test_soft_edges_stay(mode: str, kind: str, channel: str, tmp_path: Path, monkeypatch) -> None:
    """Within one of 255 levels, in order; only the levels next to black and white become them."""
    picture = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    mask = drawn(loaded(picture, tmp_path, monkeypatch, mode, kind, channel))[0, 0]
    torch.testing.assert_close(mask, torch.arange(256) / 255, rtol=0, atol=1.1 / 255)
    assert (mask[2:254].diff() > 0).all()
    assert mask[2] > 0
    assert mask[253] < 1


def test_a_white_mask_is_the_edit_alone_and_a_black_one_the_source(tiny: Tiny, tmp_path: Path, monkeypatch) -> None:
    """0.4 % of the source stayed inside the edit."""
    parts = {"trajectory": tiny.trajectory, "start": 0.0}
    (edited,) = execute(MasaCtrlNode, model=tiny.model, **parts)
    for level, expected in ((255, tiny.sample(edited)), (0, tiny.image)):
        mask = loaded(np.full((64, 64), level, np.uint8), tmp_path, monkeypatch)
        (model,) = execute(LocalBlendNode, model=edited, **parts, mask=mask)
        torch.testing.assert_close(tiny.sample(model), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        drawn(torch.tensor([0.25, 0.5, 0.75])), torch.tensor([0.25, 0.5, 0.75]), rtol=0, atol=4e-3
    )


def test_every_node_that_takes_masks_takes_them_as_they_are_meant(tiny: Tiny, tmp_path: Path, monkeypatch) -> None:
    mask = loaded(half_white(), tmp_path, monkeypatch)
    assert mask.max() < 1
    parts = {"model": tiny.model, "trajectory": tiny.trajectory}
    (blended,) = execute(LocalBlendNode, **parts, mask=mask)
    (injected,) = execute(MasaCtrlNode, **parts, source_mask=mask, target_mask=1 - mask)
    (edit,) = injected.model_options["transformer_options"][KEY].edits
    (kept_own,) = execute(MasaCtrlNode, **parts, mask=mask)
    (own,) = kept_own.model_options["transformer_options"][KEY].edits
    for kept in (blended.model_options["transformer_options"][KEY].blend.user, *edit.masks, own.mask):
        assert kept.unique().tolist() == [0, 1]
    pictures = torch.rand(2, 64, 64, 3)
    _, psnr, *_ = execute(EditMetrics, source=pictures[:1], edited=pictures[1:], mask=mask, region=INSIDE)
    error = (pictures[0] - pictures[1])[:, :32].double().square().mean()
    assert psnr == pytest.approx(float(-10 * error.log10()), rel=1e-6)

    takers = {node for node in NODES if any(slot.get_io_type() == "MASK" for slot in node.GET_SCHEMA().inputs)}
    assert takers == {LocalBlendNode, MasaCtrlNode, EditMetrics}
