"""The subgraph blueprints: served to the frontend, and each run as the frontend sends it."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from example_workflows import WIDGETS, overlaps, widget_values
from host_server import PACK, HostServer, Prompt

FOLDER = PACK / "subgraphs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
INPUTS, OUTPUTS = -10, -20  # what a subgraph calls its two ends
MODEL, SCENE = "1", "2"
STEPS = 4


def subgraph(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["definitions"]["subgraphs"][0]


EDITS = [name for name in NAMES if any(slot["type"] == "IMAGE" for slot in subgraph(name)["outputs"])]


def flattened(name: str, given: dict[str, Any], object_info: dict[str, dict[str, Any]]) -> tuple[Prompt, dict]:
    """The nodes of a block with `given` as its inputs, and the links of its outputs by name."""
    graph = subgraph(name)
    links = {link["id"]: link for link in graph["links"]}

    def value(link: dict[str, Any]) -> Any:
        if link["origin_id"] == INPUTS:
            return given[graph["inputs"][link["origin_slot"]]["name"]]
        return [f"block:{link['origin_id']}", link["origin_slot"]]

    prompt = {}
    for node in graph["nodes"]:
        info = object_info[node["type"]]
        linked = {slot["name"]: value(links[slot["link"]]) for slot in node["inputs"] if slot["link"] is not None}
        prompt[f"block:{node['id']}"] = {"class_type": node["type"], "inputs": widget_values(node, info) | linked}
    return prompt, {out["name"]: value(links[out["linkIds"][0]]) for out in graph["outputs"]}


def outer_node(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["nodes"][0]


def defaults(name: str) -> dict[str, Any]:
    """The values of the block's own widgets, untouched."""
    node = outer_node(name)
    return dict(zip((slot["name"] for slot in node["inputs"] if "widget" in slot), node["widgets_values"], strict=True))


def with_demo_model(server: HostServer, name: str, **changes: Any) -> Prompt:
    """The demo model, a scene, the block and Save Image."""
    model = {"model": [MODEL, 0], "clip": [MODEL, 1], "vae": [MODEL, 2]}
    scene = {"image": [SCENE, 0], "source_prompt": [SCENE, 1], "target_prompt": [SCENE, 2]}
    given = defaults(name) | model | scene | {"steps": STEPS, "width": 128, "height": 128} | changes
    prompt, outputs = flattened(name, given, server.object_info)
    scene_inputs = server.object_info["PalimpsestDemoScene"]["input"]["required"]
    widgets = {key: options["default"] for key, (_, options) in scene_inputs.items()}
    prompt[MODEL] = {"class_type": "PalimpsestLoadDemoModel", "inputs": {}}
    prompt[SCENE] = {"class_type": "PalimpsestDemoScene", "inputs": widgets}
    for key, link in outputs.items():
        if key == "mask":
            prompt["as image"] = {"class_type": "MaskToImage", "inputs": {"mask": link}}
            link = ["as image", 0]
        saved = {"images": link, "filename_prefix": f"blueprint/{key}"}
        prompt[f"save {key}"] = {"class_type": "SaveImage", "inputs": saved}
    return prompt


@pytest.mark.parametrize("name", EDITS)
def test_runs_and_changes_the_picture(server: HostServer, name: str) -> None:
    prompt = with_demo_model(server, name)
    prompt["save source"] = {"class_type": "SaveImage", "inputs": {"images": [SCENE, 0], "filename_prefix": "source"}}
    run = server.run(prompt)
    assert not run.errors
    pictures = {
        key.removeprefix("save "): np.asarray(Image.open(io.BytesIO(server.view(output["images"][0])))).astype(float)
        for key, output in run.outputs.items()
        if key.startswith("save ")
    }
    mask = pictures.pop("mask", None)
    assert mask is None or 0 < mask.mean() < 255
    assert {picture.shape for picture in pictures.values()} == {pictures["source"].shape}
    before, after = ("original", "edited") if "original" in pictures else ("source", "image")
    assert np.abs(pictures[before] - pictures[after]).mean() > 2


@pytest.mark.parametrize("name", NAMES)
def test_block_and_its_definition_agree(name: str) -> None:
    """The defaults outside are those inside, and nothing that a person has to fill in is hidden."""
    node, graph = outer_node(name), subgraph(name)
    assert node["title"] == graph["name"] == name
    assert node["type"] == graph["id"]
    assert overlaps(graph["nodes"]) == []
    assert [slot["name"] for slot in node["inputs"]] == [slot["name"] for slot in graph["inputs"]]
    assert [slot["type"] in WIDGETS for slot in graph["inputs"]] == ["widget" in slot for slot in node["inputs"]]
    links, values = {link["id"]: link for link in graph["links"]}, defaults(name)
    nodes = {inner["id"]: inner for inner in graph["nodes"]}
    for slot in graph["inputs"]:
        for link in (links[number] for number in slot["linkIds"]):
            inner = nodes[link["target_id"]]
            assert inner["inputs"][link["target_slot"]]["link"] == link["id"]
            if slot["name"] in values:
                assert values[slot["name"]] in inner["widgets_values"]


def test_they_are_served(server: HostServer) -> None:
    ours = [entry for entry in server.get_json("/global_subgraphs").values() if entry["source"] == "custom_node"]
    assert sorted(entry["name"] for entry in ours) == NAMES


def test_bad_input_names_the_block_s_own_input(server: HostServer) -> None:
    (error,) = server.run(with_demo_model(server, "Edit Image by Prompt", source_prompt=" ")).errors
    assert "The source prompt is empty" in error
    labels = [slot.get("label", slot["name"]) for slot in subgraph("Edit Image by Prompt")["inputs"]]
    assert any(label.startswith("source prompt") for label in labels)
