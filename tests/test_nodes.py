"""The nodes as users and saved workflows see them: schemas, help pages, what each one gives and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from comfy_api.latest import io

from palimpsest.nodes.extension import NODES

ROOT = Path(__file__).parents[1]
SCHEMAS = Path(__file__).with_name("schemas.json")

# --- schemas ---------------------------------------------------------------------------------------------------------

Node = type[io.ComfyNode]
each_node = pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)


def help_page(schema: io.Schema) -> str:
    return (ROOT / "web" / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")


def snapshot(node: Node) -> dict[str, list]:
    """What saved workflows rely on: widget values and links are stored by position, prompts by input id."""
    schema = node.GET_SCHEMA()
    return {
        "inputs": [
            [i.id, i.get_io_type(), "optional" if getattr(i, "optional", False) else "required"] for i in schema.inputs
        ],
        "outputs": [output.get_io_type() for output in schema.outputs],
    }


def test_node_ids_are_unique() -> None:
    ids = [node.GET_SCHEMA().node_id for node in NODES]
    assert len(set(ids)) == len(ids)


@each_node
def test_names(node: Node) -> None:
    schema = node.GET_SCHEMA()
    assert re.fullmatch(r"Palimpsest\w+", schema.node_id)
    assert re.fullmatch(r"[A-Z0-9][A-Za-z0-9]*( [A-Za-z0-9]+)*", schema.display_name)
    assert re.fullmatch(r"Palimpsest/[a-z ]+", schema.category)
    assert schema.description.strip().endswith(".")
    assert schema.search_aliases


@each_node
def test_every_input_and_output_has_a_tooltip(node: Node) -> None:
    schema = node.GET_SCHEMA()
    assert [slot.id for slot in [*schema.inputs, *schema.outputs] if not (slot.tooltip or "").strip()] == []


@each_node
def test_every_widget_has_a_default(node: Node) -> None:
    for widget in (i for i in node.GET_SCHEMA().inputs if isinstance(i, io.WidgetInput)):
        if isinstance(widget, io.Combo.Input):  # without a default it is the first option, if there is one
            assert widget.default is None or widget.default in widget.options
        else:
            assert widget.default is not None, widget.id


@each_node
def test_help_page_mentions_every_input_and_output(node: Node) -> None:
    schema = node.GET_SCHEMA()
    page = help_page(schema)
    assert page.startswith(f"# {schema.display_name}\n")
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert rows == [slot.id for slot in [*schema.inputs, *schema.outputs]]


def test_every_help_page_belongs_to_a_node() -> None:
    pages = {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    assert pages == {node.GET_SCHEMA().node_id for node in NODES}


@each_node
def test_tables_of_the_help_fit_its_panel(node: Node) -> None:
    """346 pixels hold two columns; further ones are cut off."""
    rows = re.findall(r"^\|.*\|$", help_page(node.GET_SCHEMA()), re.MULTILINE)
    assert [row for row in rows if row.count("|") != 3] == []


@each_node
def test_readme_has_a_row_for_it(node: Node) -> None:
    assert node.GET_SCHEMA().display_name in (ROOT / "README.md").read_text(encoding="utf-8")


@each_node
def test_saved_workflows_still_fit(node: Node) -> None:
    node_id, now = node.GET_SCHEMA().node_id, snapshot(node)
    assert json.loads(SCHEMAS.read_text(encoding="utf-8")).get(node_id) == now, (
        f"{node_id}: changing ids, types or their order breaks saved workflows. Append new inputs as optional ones. "
        f"If the change is meant, its entry in tests/schemas.json is {json.dumps(now)}"
    )


def test_no_released_node_is_gone() -> None:
    released = json.loads(SCHEMAS.read_text(encoding="utf-8"))
    assert set(released) == {node.GET_SCHEMA().node_id for node in NODES}, (
        "changing node ids breaks saved workflows: keep the node, deprecated if need be"
    )
