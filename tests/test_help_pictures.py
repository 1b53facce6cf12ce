"""The pictures of the help pages: there, small, and those of the example workflows."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from example_workflows import FOLDER
from help_pictures import DOCS, PICTURES, named
from palimpsest.nodes.extension import NODES

WITHOUT = re.compile("Palimpsest(Load|Save)(AttentionStore|Conditioning|EditDirection|Trajectory)")
"""Nodes that keep what another one has made, and show nothing of their own."""
MOST_BYTES = 30_000


@pytest.mark.parametrize("name", sorted(node.GET_SCHEMA().node_id for node in NODES))
def test_every_page_shows_what_its_node_does(name: str) -> None:
    found = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (DOCS / f"{name}.md").read_text(encoding="utf-8"))
    assert len(found) == (0 if WITHOUT.fullmatch(name) else 1)
    assert all((DOCS / path).is_file() for path in found)


@pytest.mark.parametrize("name", sorted(named()))
def test_it_is_the_workflow_s_result(name: str) -> None:
    path: Path = PICTURES / f"{name}.jpg"
    assert path.stat().st_size < MOST_BYTES
    with Image.open(path) as picture, Image.open(FOLDER / f"{name}.jpg") as thumbnail:
        shown = np.asarray(picture.convert("RGB")).astype(float)
        result = np.asarray(thumbnail.convert("RGB").resize(picture.size, Image.Resampling.LANCZOS)).astype(float)
    assert np.abs(shown - result).mean() < 4, "run `python tools/help_pictures.py`"
