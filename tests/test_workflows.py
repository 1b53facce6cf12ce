"""The example workflows: both forms of each say the same, and the server runs and serves them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from example_workflows import FOLDER, NAMES, WITHOUT_DOWNLOAD, api_form, overlaps, to_api, ui_form
from host_server import HostServer, Prompt, Run

ENLARGED = 6


def reseed_samplers(prompt: Prompt, seed: int) -> None:
    """Another seed where it changes nothing: in samplers that add no noise, and before one that adds its own."""
    seeds = [(node, "noise_seed") for node in prompt.values() if node["inputs"].get("add_noise") in (False, "disable")]
    seeds += [(node, "seed") for node in prompt.values() if node["class_type"] == "PalimpsestVirtualInversion"]
    assert seeds
    for node, name in seeds:
        node["inputs"][name] = seed


def saved_pictures(server: HostServer, run: Run) -> list[np.ndarray]:
    assert not run.errors
    return [np.asarray(Image.open(io.BytesIO(server.view(image)))).astype(float) for image in run.images()]


def source_and_edits(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """The pictures of a batch, or the first two of those that stand side by side in one."""
    if len(pictures) > 1:
        return pictures
    side, gap = ENLARGED * 64, ENLARGED * 2
    return [pictures[0][:, :side], pictures[0][:, side + gap : 2 * side + gap]]


def test_every_workflow_has_both_forms() -> None:
    assert sorted(path.stem for path in (FOLDER / "api").glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_forms_are_equal(server: HostServer, name: str) -> None:
    assert to_api(ui_form(name), server.object_info) == api_form(name)


@pytest.mark.parametrize("name", NAMES)
def test_layout_is_clean(name: str) -> None:
    workflow = ui_form(name)
    assert [node["type"] for node in workflow["nodes"]].count("MarkdownNote") == 1
    assert workflow["groups"]
    assert overlaps(workflow["nodes"]) == []


@pytest.mark.parametrize("name", WITHOUT_DOWNLOAD)
def test_runs_and_repeats_bit_for_bit(server: HostServer, name: str) -> None:
    prompt = api_form(name, steps=10)
    pictures = saved_pictures(server, server.run(prompt))
    source, *edits = source_and_edits(pictures)
    assert edits
    assert all(np.abs(source - edit).mean() > 2 for edit in edits)

    reseed_samplers(prompt, 12345)
    again = saved_pictures(server, server.run(prompt))
    assert all(np.array_equal(one, other) for one, other in zip(pictures, again, strict=True))


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


@pytest.mark.parametrize("name", WITHOUT_DOWNLOAD)
def test_thumbnails_are_served(server: HostServer, name: str) -> None:
    thumbnail = Image.open(io.BytesIO(server.get(f"/api/workflow_templates/palimpsest/{name}.jpg")))
    assert thumbnail.format == "JPEG"
    assert 500 <= thumbnail.width <= 700


def test_every_node_has_a_help_page(server: HostServer) -> None:
    ours = [name for name, info in server.object_info.items() if info["python_module"] == "custom_nodes.palimpsest"]
    assert ours
    for name in ours:
        page = server.get(f"/extensions/palimpsest/docs/{name}.md").decode()
        assert page.startswith("# "), f"{name} needs a help page that begins with its title"
