"""What the pack adds to its nodes in the host's real frontend, on the classic canvas and in Nodes 2.0."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from browser import Page
from example_workflows import ui_form
from host_server import HostServer
from test_browser import HARMLESS, NODES, RUN_BUTTON, complaints, open_template, set_steps

VUE = "Comfy.VueNodes.Enabled"
LOOK = """(type => {
    const node = app.rootGraph.nodes.find(node => node.type === type), { ds } = app.canvas;
    ds.scale = 1.2;
    [ds.offset[0], ds.offset[1]] = [80 - node.pos[0], 120 - node.pos[1]];
    app.canvas.setDirty(true, true);
    return new Promise(done => setTimeout(done, 1000));
})(%s)"""
TYPE = """((from, to) => {
    const area = [...document.querySelectorAll('textarea')].find(area => area.value === from);
    area.focus();
    area.select();
    document.execCommand('insertText', false, to);
    area.blur();
})(%s, %s)"""
# A canvas that is seen from afar may have no boxes in the page.
BOXES = f"({NODES}).flatMap(node => node.widgets ?? []).filter(widget => widget.name.startsWith('palimpsest_'))"
PAIRS = f"""{BOXES}.flatMap(({{ element }}) => [...element.querySelectorAll('.palimpsest-pair')])
    .map(pair => pair.className.split('-').at(-1) + ': '
        + [...pair.querySelectorAll('.palimpsest-side')].map(side => side.textContent).join(' > '))"""
TEXTS = f"{BOXES}.map(({{ element }}) => element.textContent)"
# The width of Local Blend's preview, on either canvas.
HEAT = f"""(node => node.imgs?.[0] ?? document.querySelector(`[data-node-id="${{node.id}}"] img`))(
    ({NODES}).find(node => node.type === 'PalimpsestLocalBlend'))?.naturalWidth"""
HURT = "<img src=x onerror=window.hurt=1>"


@pytest.fixture(params=[False, True], ids=["classic", "nodes 2.0"])
def steps(request: pytest.FixtureRequest, server: HostServer) -> Iterator[int]:
    """Sets the kind of canvas; how many steps to run there, of which the server holds no results."""
    server.post(f"/settings/{VUE}", request.param)
    yield 6 + request.param
    server.post(f"/settings/{VUE}", False)


def widget(page: Page, node: str, name: str) -> str:
    found = f"({NODES}).find(node => node.type === '{node}').widgets.find(widget => widget.name === '{name}')"
    return page.evaluate(f"{found}.value")


def retype(page: Page, name: str, text: str) -> None:
    old = widget(page, "PalimpsestPromptEdit", name)
    page.evaluate(TYPE % (json.dumps(old), json.dumps(text)))


def kept_values(page: Page, node: str) -> list:
    return page.evaluate(f"app.rootGraph.serialize().nodes.find(node => node.type === '{node}').widgets_values")


def test_words_follow_what_is_typed(page: Page, server: HostServer, steps: int) -> None:
    open_template(page, server, "edit-generated-image")
    page.evaluate(LOOK % json.dumps("PalimpsestPromptEdit"))
    page.wait_for(f"({PAIRS}).length > 3")
    retype(page, "source_prompt", "a red circle on grey")
    retype(page, "target_prompt", f"a red zyzzyva on grey {HURT}")
    page.wait_for(f"({PAIRS}).some(pair => pair.includes('zyzzyva'))")
    assert page.evaluate(PAIRS)[1:5] == ["kept: red > red", "dropped: circle > ", "new:  > zyzzyva", "kept: on > on"]
    assert "img" in page.evaluate("document.querySelector('.palimpsest-words').textContent")
    assert page.evaluate("document.querySelector('.palimpsest-box img') === null && window.hurt === undefined")

    retype(page, "target_prompt", "a red zyzzyva on grey")
    page.wait_for(f"({PAIRS}).length === 5")
    assert page.evaluate(PAIRS)[2] == "swapped: circle > zyzzyva"
    unknown = page.evaluate("[...document.querySelectorAll('.palimpsest-unknown')].map(word => word.textContent)")
    assert "zyzzyva" in unknown
    assert "The demo model does not know: " in page.evaluate(TEXTS)[0]

    before = widget(page, "PalimpsestP2PAttentionController", "reweight")
    for after in ("zyzzyva:1.5", ""):
        page.click(".palimpsest-swapped .palimpsest-side:last-child button")
        assert widget(page, "PalimpsestP2PAttentionController", "reweight") == ", ".join(filter(None, [before, after]))
    values = ["a red circle on grey", "a red zyzzyva on grey", "auto"]
    assert kept_values(page, "PalimpsestPromptEdit") == values
    assert complaints(page) == []
    assert [error for error in page.errors if not error.startswith(HARMLESS)] == []


def test_words_costs_and_heat_after_a_run(page: Page, server: HostServer, steps: int) -> None:
    open_template(page, server, "local-blend")
    # Before a run, from Demo Scene's captions.
    page.wait_for(f"({PAIRS}).length > 3")
    words = page.evaluate(PAIRS)
    set_steps(page, steps)
    page.click(RUN_BUTTON)
    page.wait_for(f"({NODES}).find(node => node.type === 'SaveImage').imgs?.[0]?.naturalWidth > 0", seconds=120)
    assert page.evaluate(PAIRS) == words
    said = page.evaluate(TEXTS)
    assert any(text.startswith(f"{steps} network evaluations, {steps} rows, ") for text in said)
    assert any(text.startswith(f"{steps} network evaluations, {3 * steps} rows, ") for text in said)
    assert page.evaluate(HEAT) == 256

    page.evaluate(LOOK % json.dumps("PalimpsestPromptEdit"))
    page.click(".palimpsest-swapped .palimpsest-side button")
    picked = page.evaluate("document.querySelector('.palimpsest-swapped .palimpsest-side button').textContent")
    assert widget(page, "PalimpsestLocalBlend", "words") == picked
    for node in ui_form("local-blend")["nodes"]:
        if node["type"] in ("PalimpsestDDIMInversion", "PalimpsestPromptEdit"):
            assert len(kept_values(page, node["type"])) == len(node["widgets_values"])
    assert complaints(page) == []
    assert [error for error in page.errors if not error.startswith(HARMLESS)] == []
