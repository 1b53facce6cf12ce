"""The example workflows as files: the UI form that people open, and the API form that the server runs."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

from host_server import PACK, Prompt

FOLDER = PACK / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
FIRST = "edit-real-image"  # opens the README
EDITS = (  # save the source and its edits, side by side or as a batch
    "add-something",
    "clip-guidance",
    "concept-guidance",
    "controlnet-edit",
    "diffedit",
    "edict",
    "edit-friendly",
    "edit-generated-image",
    "edit-real-image",
    "few-step-edit",
    "flow-edit",
    "flow-inversion-edit",
    "h-space",
    "image-pull",
    "inpaint",
    "instruct",
    "keep-layout-change-rest",
    "learn-edit",
    "local-blend",
    "masactrl-edit",
    "negative-prompt-inversion",
    "null-text",
    "obelm",
    "only-here-and-nowhere-else",
    "pix2pix-zero",
    "pnp-translate",
    "several-targets",
    "strengthen-a-word",
    "stylediffusion",
    "uni-edit",
    "virtual-inversion",
)
# Each of these reads what the one before it has written.
KEEPING = (
    "keep-inversion",
    "use-kept-inversion",
    "keep-direction",
    "use-kept-direction",
    "keep-h-space",
    "use-kept-h-space",
)
LOOKING = ("attention-maps", "feature-viewer", "flow-attention-maps")
MEASURING = "measure-edit"
PAIRS = "make-edit-pairs"
WITHOUT_DOWNLOAD = (*EDITS, *KEEPING, *LOOKING, MEASURING, PAIRS)
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
TITLE_HEIGHT = 30
MUTED = 2
COMPARER = {"__value__": ["", ""]}  # a slider that no workflow keeps; wrapped, for a list would be a link

Node = dict[str, Any]


def api_form(name: str, steps: int | None = None) -> Prompt:
    prompt = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        if steps is not None and "steps" in node["inputs"]:
            node["inputs"]["steps"] = steps
    return prompt


def ui_form(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def to_api(workflow: dict[str, Any], object_info: dict[str, dict[str, Any]]) -> Prompt:
    """What the frontend makes of the UI form when it is queued."""
    links = {link: [str(source), slot] for link, source, slot, *_ in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote" or node["mode"] == MUTED:
            continue
        info = object_info[node["type"]]
        linked = {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": widget_values(node, info) | linked,
            "_meta": {"title": node.get("title") or info["display_name"] or node["type"]},
        }
    return prompt


def widget_values(node: Node, info: dict[str, Any]) -> dict[str, Any]:
    """The values by widget. Some widgets have another one behind them that is the frontend's own business."""
    values = iter(node["widgets_values"])
    found = {}
    for name, (kind, *options) in (info["input"].get("required", {}) | info["input"].get("optional", {})).items():
        if kind == "IMAGECOMPARE":
            found[name] = COMPARER
        elif isinstance(kind, list) or kind in WIDGETS:
            found[name] = next(values)
            if any(option.get("control_after_generate") or option.get("image_upload") for option in options):
                next(values)
    assert not list(values), f"{node['type']} has more values than widgets"
    return found


def overlaps(nodes: list[Node]) -> list[str]:
    return [f"{one['type']} and {other['type']}" for one, other in combinations(nodes, 2) if touch(one, other)]


def touch(one: Node, other: Node) -> bool:
    (left, top, right, bottom), (other_left, other_top, other_right, other_bottom) = box(one), box(other)
    return left < other_right and other_left < right and top < other_bottom and other_top < bottom


def box(node: Node) -> tuple[float, float, float, float]:
    left, top, width, height = *node["pos"], *node["size"]
    if node["flags"].get("collapsed"):
        return left, top - TITLE_HEIGHT, left + width, top
    return left, top - TITLE_HEIGHT, left + width, top + height
