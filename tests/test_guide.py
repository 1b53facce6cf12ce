"""GUIDE.md, which says what to take for which edit: what it names is there, with the numbers of README and nodes."""

from __future__ import annotations

import re

from example_workflows import NAMES
from host_server import PACK
from palimpsest.nodes.extension import NODES
from test_package import CONFIG

GUIDE = (PACK / "GUIDE.md").read_text(encoding="utf-8")
README = (PACK / "README.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", GUIDE, flags=re.MULTILINE)


def cells(section: str) -> list[list[str]]:
    """The rows of its table, without the two of its head."""
    rows = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)
    return [row.split(" | ") for row in rows[1:]]


def test_it_names_templates_that_there_are() -> None:
    named = [name for *_, column in cells(SECTIONS[0]) for name in re.findall(r"`([^`]+)`", column)]
    assert set(named) <= set(NAMES)
    assert named


def test_its_numbers_are_those_of_the_readme() -> None:
    measured = [row[2:] for row in cells(SECTIONS[1])]
    assert measured
    assert [row for row in measured if " | ".join(row) not in README] == []


def test_its_settings_begin_with_the_nodes_defaults() -> None:
    """Where they are numbers: `P2P` names P2P Attention Controller."""
    schemas = [node.GET_SCHEMA() for node in NODES]
    checked = 0
    for setting, begin, *_ in cells(SECTIONS[2]):
        named = re.findall(r"`(\w+)`", setting)
        node = next((s for s in schemas if s.display_name.startswith(setting.split(" `")[0].split(" and ")[0])), None)
        if node is None or not begin[0].isdigit():
            continue
        inputs = {slot.id: slot.default for slot in node.inputs if slot.id in named}
        assert [inputs[name] for name in named] == [float(value) for value in begin.split(", ")], setting
        checked += len(named)
    assert checked > 10


def test_it_is_linked_from_the_readme_and_from_help_pages() -> None:
    assert "(GUIDE.md)" in README
    pages = {node.GET_SCHEMA().node_id: PACK / "web" / "docs" / f"{node.GET_SCHEMA().node_id}.md" for node in NODES}
    links = {name: re.findall(r"\((\S+GUIDE\.md)\)", page.read_text(encoding="utf-8")) for name, page in pages.items()}
    linking = {name: found for name, found in links.items() if found}
    assert {"PalimpsestP2PAttentionController", "PalimpsestFlowEdit", "PalimpsestPromptEdit"} <= linking.keys()
    address = f"{CONFIG.project.urls.repository}/blob/main/GUIDE.md"
    assert all(found == [address] for found in linking.values())
