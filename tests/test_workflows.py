"""The example workflows: both forms of each say the same, and the server runs and serves them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from example_workflows import (
    EDITS,
    FIRST,
    FOLDER,
    KEEPING,
    LOOKING,
    MEASURING,
    NAMES,
    PAIRS,
    api_form,
    to_api,
    ui_form,
)
from host_server import PACK, HostServer, Prompt, Run
from palimpsest import dev
from palimpsest.metrics.comparison import GAP

ENLARGED = 3
SAMPLERS = ("KSampler", "PalimpsestEditSampler", "PalimpsestRecordTrajectory", "SamplerCustomAdvanced")


def sample_again(prompt: Prompt) -> None:
    """An input that the samplers do not have: it changes nothing but what the host remembers them by."""
    samplers = [node for node in prompt.values() if node["class_type"] in SAMPLERS]
    assert samplers
    for node in samplers:
        node["inputs"]["again"] = True


def saved_pictures(server: HostServer, run: Run) -> list[np.ndarray]:
    assert not run.errors
    shown = [output for output in run.outputs.values() if "a_images" not in output]  # the host's comparer
    assert [list(output) for output in shown] == [["images"]]  # for clients that take the first, or any
    assert not run.images("temp")
    return [np.asarray(Image.open(io.BytesIO(server.view(image)))).astype(float) for image in run.images()]


def source_and_edits(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """The pictures of a batch, whose last is the source, or the first two of those that stand side by side in one."""
    if len(pictures) > 1:
        return pictures[::-1]
    side, gap = ENLARGED * 128, ENLARGED * 2
    return [pictures[0][:side, :side], pictures[0][:side, side + gap : 2 * side + gap]]


def test_every_workflow_has_both_forms() -> None:
    assert sorted(path.stem for path in (FOLDER / "api").glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_forms_are_equal(server: HostServer, name: str) -> None:
    assert to_api(ui_form(name), server.object_info) == api_form(name)


@pytest.mark.parametrize("name", EDITS)
def test_runs_and_repeats_bit_for_bit(server: HostServer, name: str) -> None:
    prompt = api_form(name, steps=10)
    pictures = saved_pictures(server, server.run(prompt))
    source, *edits = source_and_edits(pictures)
    assert edits
    assert all(np.abs(source - edit).mean() > 2 for edit in edits)

    sample_again(prompt)
    again = saved_pictures(server, server.run(prompt))
    assert all(np.array_equal(one, other) for one, other in zip(pictures, again, strict=True))


def test_pairs_are_made_and_kept(server: HostServer) -> None:
    """Each saved picture has a pair, before above after; the second run makes none anew."""
    prompt = api_form(PAIRS)
    pictures = saved_pictures(server, server.run(prompt))
    folder = server.folder / "output" / "edit-pairs"
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(pictures) == len(prompt["3"]["inputs"]["captions"].splitlines())
    assert len(written) == 2 * len(pictures) + 2
    side, gap = ENLARGED * 128, ENLARGED * 2
    for picture in pictures:
        assert np.abs(picture[:side] - picture[side + gap :]).mean() > 2
    prompt["3"]["inputs"]["again"] = True
    again = saved_pictures(server, server.run(prompt))
    assert all(np.array_equal(one, other) for one, other in zip(pictures, again, strict=True))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written


def test_an_edit_is_measured(server: HostServer) -> None:
    """Its picture holds before, after, difference, truth and mask; the edit is another picture than the source."""
    (picture,) = saved_pictures(server, server.run(api_form(MEASURING, steps=10)))
    side = (picture.shape[1] - 6 * GAP) // 5
    top = (picture.shape[0] - side) // 2
    panels = [picture[top : top + side, GAP + i * (side + GAP) :][:, :side] for i in range(5)]
    before, after, difference, truth, mask = panels
    inside = mask > 128
    assert np.abs(before - after).mean() > 2
    assert difference[inside].mean() > difference[~inside].mean()
    assert np.abs(after - truth)[inside].mean() < np.abs(before - truth)[inside].mean()


def test_what_was_kept_is_used(tmp_path: Path) -> None:
    """In a new output folder, for the files are named by their numbers."""
    with HostServer(tmp_path) as fresh:
        for name in KEEPING:
            (picture,) = saved_pictures(fresh, fresh.run(api_form(name, steps=4)))
            assert picture.std() > 5, name


@pytest.mark.parametrize("name", LOOKING)
def test_shows_several_pictures(server: HostServer, name: str) -> None:
    pictures = saved_pictures(server, server.run(api_form(name, steps=4)))
    assert len(pictures) > 1
    assert all(picture.std() > 5 for picture in pictures)


@pytest.mark.slow
def test_gradients_leave_the_server_as_it_was(server: HostServer, tmp_path: Path) -> None:
    """After workflows that take gradients an edit has the same bits as on a server that ran nothing else."""
    for name in ("null-text", "pix2pix-zero"):
        assert not server.run(api_form(name, steps=4)).errors
    prompt = api_form("edit-real-image", steps=20)  # not run before: nothing is cached
    after = saved_pictures(server, server.run(prompt))
    with HostServer(tmp_path) as fresh:
        alone = saved_pictures(fresh, fresh.run(prompt))
    assert all(np.array_equal(one, other) for one, other in zip(after, alone, strict=True))


def test_templates_are_served(server: HostServer) -> None:
    assert sorted(server.get_json("/workflow_templates")["palimpsest"]) == NAMES
    for name in NAMES:
        assert server.get_json(f"/api/workflow_templates/palimpsest/{name}.json") == ui_form(name)


@pytest.mark.parametrize("name", NAMES)
def test_thumbnails_are_served(server: HostServer, name: str) -> None:
    thumbnail = Image.open(io.BytesIO(server.get(f"/api/workflow_templates/palimpsest/{name}.jpg")))
    assert thumbnail.format == "JPEG"
    assert 500 <= thumbnail.width <= 700


def test_the_first_picture_carries_its_workflow() -> None:
    picture = Image.open(PACK / "web" / "pictures" / f"{FIRST}.png")
    assert json.loads(picture.info["workflow"]) == ui_form(FIRST)
    assert json.loads(picture.info["prompt"]) == api_form(FIRST)


def test_every_node_has_a_help_page(server: HostServer) -> None:
    ours = [name for name, info in server.object_info.items() if info["python_module"] == "custom_nodes.palimpsest"]
    assert ours
    for name in ours:
        page = server.get(f"/extensions/palimpsest/docs/{name}.md").decode()
        assert page.startswith("# "), f"{name} needs a help page that begins with its title"


def test_own_photo_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dev.py demo --checkpoint` finds what it fills in, and the picture that it copies is the last one saved."""
    checkpoint, photo = tmp_path / "model.safetensors", tmp_path / "photo.png"
    checkpoint.touch()
    photo.touch()
    monkeypatch.setattr(dev, "BASE", tmp_path / "base")
    for folder in ("models/checkpoints", "input"):
        (tmp_path / "base" / folder).mkdir(parents=True)
    own, _ = dev.parse(["demo", *f"--checkpoint {checkpoint} --image {photo} --source a --target b --steps 3".split()])
    workflow = api_form("edit-photo")
    dev.fill_in(workflow, own)
    values = [value for node in workflow.values() for value in node["inputs"].values() if not isinstance(value, list)]
    assert all(values.count(value) == 1 for value in ("model.safetensors", "photo.png", "a", "b", 3))
    picture = {"filename": "edit.png"}
    assert dev.last_picture(workflow, {name: {"images": [picture]} for name in workflow}) == picture
