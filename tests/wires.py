"""Where the frontend draws the wires of a workflow: splines, which reroutes turn."""

from __future__ import annotations

from typing import Any

import numpy as np

from example_workflows import Node, box

FIRST_SLOT, SLOT_HEIGHT = 13, 20
LONGEST_TANGENT = 80  # of a reroute
TIMES = np.linspace(0, 1, 41)[:, None]


def wires_behind_nodes(workflow: dict[str, Any]) -> list[str]:
    nodes = {node["id"]: node for node in workflow["nodes"]}
    boxes = np.array([box(node) for node in workflow["nodes"]])
    found = []
    for link, source, slot, target, entry, _ in workflow["links"]:
        stops = [output_point(nodes[source], slot), *reroutes(workflow, link), input_point(nodes[target], entry)]
        x, y = np.concatenate(splines(np.array(stops, dtype=float))).T[:, :, None]
        left, top, right, bottom = boxes.T
        behind = ((left < x) & (x < right) & (top < y) & (y < bottom)).any(axis=0)
        found += [
            f"{nodes[source]['type']} to {nodes[target]['type']} behind {node['type']}"
            for node, hidden in zip(workflow["nodes"], behind, strict=True)
            if hidden
        ]
    return found


def output_point(node: Node, slot: int) -> tuple[float, float]:
    _, top, right, bottom = box(node)
    if node["flags"].get("collapsed"):
        return right, (top + bottom) / 2
    return right, node["pos"][1] + FIRST_SLOT + SLOT_HEIGHT * slot


def input_point(node: Node, entry: int) -> tuple[float, float]:
    """A widget has its dot where it is itself, somewhere in the node; the others come first, from the top."""
    left, top, _, bottom = box(node)
    if node["flags"].get("collapsed") or "widget" in node["inputs"][entry]:
        return left, (top + bottom) / 2
    place = sum("widget" not in slot for slot in node["inputs"][:entry])
    return left, node["pos"][1] + FIRST_SLOT + SLOT_HEIGHT * place


def reroutes(workflow: dict[str, Any], link: int) -> list[list[float]]:
    """The wire's reroutes from source to target. It names the last one, and each names the one before it."""
    by_id = {reroute["id"]: reroute for reroute in workflow["extra"].get("reroutes", [])}
    at = next((end["parentId"] for end in workflow["extra"].get("linkExtensions", []) if end["id"] == link), None)
    points = []
    while at is not None:
        points.insert(0, by_id[at]["pos"])
        at = by_id[at].get("parentId")
    return points


def splines(stops: np.ndarray) -> list[np.ndarray]:
    """One curve between two stops each. Slots are left and entered level; a reroute halves its wire's turn."""
    steps = np.diff(stops, axis=0)
    lengths = np.hypot(*steps.T) / 4
    angles = np.arctan2(*steps.T[::-1])
    turns = (angles[:-1] - angles[1:]) / 2
    turns[np.abs(turns) > np.pi / 2] += np.pi
    angles = np.concatenate([[0], angles[:-1] - turns, [0]])
    tangents = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    curves = []
    for place, (start, end, length) in enumerate(zip(stops[:-1], stops[1:], lengths, strict=True)):
        leave = length if place == 0 else min(length, LONGEST_TANGENT)
        enter = length if place == len(steps) - 1 else min(length, LONGEST_TANGENT)
        out, into = start + leave * tangents[place], end - enter * tangents[place + 1]
        rest = 1 - TIMES
        curves.append(rest**3 * start + 3 * rest**2 * TIMES * out + 3 * rest * TIMES**2 * into + TIMES**3 * end)
    return curves
