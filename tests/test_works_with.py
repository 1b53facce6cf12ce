"""Every edit beside every node of the host that matters to a UNet: the table of works_with.py, and the help's."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.host.files.store import AttentionStore
from palimpsest.host.layer import Edit
from palimpsest.inversion.run import Guidance, invert
from test_composition import Still, blend, edit, stored
from tiny import Tiny
from works_with import EDITORS, ROWS, WITH, Refused, Row, help_section

DOCS = Path(__file__).parents[1] / "web" / "docs"
STEPS = 3


def each(rows: Iterable[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


each_kind = pytest.mark.parametrize("kind", [kind for kinds in EDITORS.values() for kind in kinds])


def edit_of(kind: str) -> Edit:
    if kind == "refine and reweight":
        refined = edit("refine")
        return dataclasses.replace(refined, gain=torch.linspace(0, 2, 77)[None])
    if kind == "with masks":
        foreground = (torch.arange(8) < 4).float().expand(8, 8)
        return dataclasses.replace(edit("masactrl"), masks=(foreground, foreground.flip(-1)))
    return edit("swap" if kind == "local blend" else kind)


def edited(tiny: Tiny, kind: str, model: ModelPatcher, store: AttentionStore | None = None) -> ModelPatcher:
    model = attach(model, tiny.trajectory, edit_of(kind), store)
    return attach_blend(model, tiny.trajectory, blend(4)) if kind == "local blend" else model


class Beside:
    """A row's node, the trajectory and the store that belong to it, and what it gives without an edit."""

    def __init__(self, row: Row, base: Tiny) -> None:
        self.row = row
        self.tiny = Tiny(STEPS, model=row.model(base.model)) if row.inversion == WITH else base
        self.plain = base.model
        self.node = row.model(base.model)

    def sample(self, model: ModelPatcher) -> Tensor:
        torch.manual_seed(0)  # for nodes that draw
        return self.row.sample(self.tiny, model)

    @functools.cached_property
    def store(self) -> AttentionStore | None:
        return stored(self.tiny.model, self.tiny) if self.row.store == "same result" else None

    @functools.cached_property
    def alone(self) -> Tensor:
        return self.sample(self.node)


@pytest.fixture(scope="module")
def base() -> Tiny:
    with torch.inference_mode():
        return Tiny(STEPS)


@pytest.fixture(scope="module")
def beside(base: Tiny) -> Callable[[Row], Beside]:
    return functools.cache(lambda row: Beside(row, base))


@pytest.fixture(scope="module")
def edits(base: Tiny) -> Callable[[str], Tensor]:
    """What an edit gives without a node."""
    return functools.cache(lambda kind: base.sample(edited(base, kind, base.model)))


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@each(ROWS)
@each_kind
def test_edit_and_node(
    row: Row, kind: str, base: Tiny, beside: Callable, edits: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """Both take effect in either order, live and from a store; or a sentence says why not."""
    setting, refused = beside(row), row.outcome(kind)
    if refused is not None:
        with pytest.raises(ValueError, match=refused.sentence):
            setting.sample(edited(setting.tiny, kind, setting.node))
        return
    first = setting.sample(edited(setting.tiny, kind, setting.node))
    if row.first:
        last = setting.sample(edited(setting.tiny, kind, setting.node, setting.store))
    else:
        last = setting.sample(row.model(edited(setting.tiny, kind, setting.plain, setting.store)))
    assert torch.isfinite(first).all()
    assert apart(last, first) < 1e-4
    assert "the attention store lacks" not in caplog.text
    assert apart(first, setting.alone) > 1e-3
    assert (apart(first, edits(kind)) > 1e-3) if row.acts else (apart(first, edits(kind)) < 1e-4)
    if kind == "local blend":
        torch.testing.assert_close(first[..., 4:], base.image[..., 4:])
        assert apart(first[..., :4], base.image[..., :4]) > 1e-3


@each(ROWS)
def test_an_edit_to_the_same_leaves_a_node_its_work(row: Row, base: Tiny, beside: Callable) -> None:
    """Where it is not refused; and plain sampling afterwards has the same bits."""
    before = base.sample(base.model)
    setting = beside(row)
    if row.outcome("swap") is None:
        assert apart(setting.sample(attach(setting.node, setting.tiny.trajectory, Still())), setting.alone) < 1e-4
    assert torch.equal(base.sample(base.model), before)


@each(row for row in ROWS if row.inversion is not None)
def test_inversion_with_a_node(row: Row, base: Tiny, beside: Callable) -> None:
    setting = beside(row)
    prompt = Guidance(base.source, None, 1.0)
    if isinstance(row.inversion, Refused):
        with pytest.raises(ValueError, match=row.inversion.sentence):
            invert(setting.node, prompt, base.image, base.sigmas)
    elif row.inversion == WITH and row.acts:
        assert apart(setting.tiny.trajectory.states, base.trajectory.states) > 1e-4


@each(row for row in ROWS if isinstance(row.store, Refused))
def test_stores_that_are_refused(row: Row, beside: Callable) -> None:
    with pytest.raises(ValueError, match=row.store.sentence):
        stored(beside(row).node, beside(row).tiny)


@pytest.mark.parametrize("page", EDITORS)
def test_the_help_tells_what_is_checked_here(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"^## Works with\n.*?(?=^## )", text, re.MULTILINE | re.DOTALL)
    assert found == help_section(page), f"this part of {page}.md is to read\n\n{help_section(page)}"
