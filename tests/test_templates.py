"""What every example workflow is to be: readable at once, with one result; and together they show every node."""

from __future__ import annotations

import pytest

from example_workflows import NAMES, api_form, box, overlaps, ui_form
from host_server import HostServer
from wires import wires_behind_nodes

SCREEN = 1366, 768
FITTED = 0.75
"""The part of the canvas that the frontend fits a template into."""
MARGIN = 10
READABLE = 8 / 14
"""The zoom below which the frontend draws no text: 8 pixels for its font of 14."""
MOST_NODES = 16
PACK_MODULE = "custom_nodes.palimpsest"
PREVIEW = 220
"""What the frontend's picture of a run adds to a node's height at most, below its widgets."""
SAMPLING = (
    "KSampler",
    "PalimpsestDDIMInversion",
    "PalimpsestEDICTInversion",
    "PalimpsestEditFriendlyInversion",
    "PalimpsestEditSampler",
    "PalimpsestLearnEditFromPair",
    "PalimpsestLocalBlend",
    "PalimpsestMakeEditPairs",
    "PalimpsestNullTextInversion",
    "PalimpsestOBELMInversion",
    "PalimpsestRecordAttention",
    "PalimpsestRecordTrajectory",
    "SamplerCustomAdvanced",
)


@pytest.mark.parametrize("name", NAMES)
def test_opens_where_text_is_drawn(name: str) -> None:
    left, top, right, bottom = zip(*map(box, ui_form(name)["nodes"]), strict=True)
    size = max(right) - min(left) + 2 * MARGIN, max(bottom) - min(top) + 2 * MARGIN
    zoom = min(FITTED * screen / extent for screen, extent in zip(SCREEN, size, strict=True))
    assert zoom > READABLE


@pytest.mark.parametrize("name", NAMES)
def test_layout_is_clean(name: str) -> None:
    workflow = ui_form(name)
    assert len(workflow["nodes"]) <= MOST_NODES
    assert [node["type"] for node in workflow["nodes"]].count("MarkdownNote") == 1
    assert workflow["groups"]
    assert overlaps(workflow["nodes"]) == []
    assert wires_behind_nodes(workflow) == []


@pytest.mark.parametrize("name", NAMES)
def test_live_previews_cover_no_other_node(name: str) -> None:
    nodes = ui_form(name)["nodes"]
    for node in nodes:
        if node["type"] in SAMPLING:
            node["size"][1] += PREVIEW
    assert overlaps(nodes) == []


@pytest.mark.parametrize("name", NAMES)
def test_only_the_result_is_shown(name: str, server: HostServer) -> None:
    """Clients take the first picture of a run, or any: there is no other than those of the one node that saves."""
    kinds = [node["class_type"] for node in api_form(name).values()]
    info = {kind: server.object_info[kind] for kind in kinds}
    shown = [kind for kind in kinds if info[kind]["output_node"] and info[kind]["python_module"] != PACK_MODULE]
    assert [kind for kind in shown if kind != "ImageCompare"] == ["SaveImage"]  # the comparer's are no "images"


def test_every_node_is_in_a_workflow(server: HostServer) -> None:
    ours = {kind for kind, info in server.object_info.items() if info["python_module"] == PACK_MODULE}
    used = {node["class_type"] for name in NAMES for node in api_form(name).values()}
    assert ours - used == set()
