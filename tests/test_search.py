"""The frontend's node search, typed into as people do: among all of the host's nodes the right one is near the top."""

from __future__ import annotations

import json

import pytest

from browser import Page
from host_server import HostServer

FIRST = 3
# One of these has to be among the first. Names alone outrank popular nodes of the host, aliases do not.
WANTED = {
    "unsampler": ("Invert Image (Unsampler)",),
    "unsample": ("Invert Image (Unsampler)",),
    "invert": ("Invert Image (Unsampler)", "DDIM Inversion"),
    "image editing": ("Prompt Edit", "Edit Sampler"),
    "edit image": ("Edit Image by Prompt",),
    "edit photo": ("Edit Image by Prompt", "Prompt Edit"),
    "change words": ("Prompt Edit",),
    "replace object": ("Prompt Edit",),
    "img2img edit": ("Prompt Edit", "DDIM Inversion"),
    "prompt to prompt": ("Prompt Edit", "P2P Attention Controller"),
    "flowedit": ("Flow Edit",),
    "flux edit": ("Flow Edit",),
    "attention control": ("P2P Attention Controller",),
}
READY = "window.app?.isGraphReady && app.rootGraph.nodes.length && !app.extensionManager.spinner"
RESULTS = (
    "[...document.querySelectorAll('#results-list [data-testid=result-item]')].map(e => e.innerText.split('\\n')[0])"
)
BOX = "input[aria-controls=results-list]"


@pytest.fixture
def box(page: Page, server: HostServer) -> Page:
    """An empty canvas with the search box open, which lists popular nodes as soon as it knows them."""
    page.open(server.url)
    page.wait_for(READY, seconds=90)
    page.evaluate("app.rootGraph.clear()")
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.wait_for(f"{RESULTS}.length > {FIRST}")
    return page


def found(page: Page, query: str) -> list[str]:
    page.evaluate(f"document.querySelector({json.dumps(BOX)}).select()")
    page.send("Input.insertText", text=query)
    page.evaluate("new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
    return page.evaluate(RESULTS)[:FIRST]


def test_what_people_want_comes_first(box: Page) -> None:
    first = {query: found(box, query) for query in WANTED}
    missed = {query: names for query, names in first.items() if not set(names) & set(WANTED[query])}
    assert missed == {}


def test_the_unsampler_is_a_block_of_three_nodes(box: Page, server: HostServer) -> None:
    found(box, "unsampler")
    for kind in ("keyDown", "keyUp"):
        box.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)
    box.wait_for("app.rootGraph.nodes.length === 1")
    assert box.evaluate("app.rootGraph.nodes[0].widgets.map(widget => widget.name)") == ["prompt", "steps"]
    prompt = box.evaluate("app.graphToPrompt().then(prompt => prompt.output)")
    nodes = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert set(nodes) == {"CLIPTextEncode", "VAEEncode", "PalimpsestDDIMInversion"}
    inversion = nodes["PalimpsestDDIMInversion"]
    linked = {name: prompt[value[0]]["class_type"] for name, value in inversion.items() if isinstance(value, list)}
    assert linked == {"source": "CLIPTextEncode", "image": "VAEEncode"}
    schema = server.object_info["PalimpsestDDIMInversion"]["input"]
    options = {name: spec[1] for part in ("required", "optional") for name, spec in schema[part].items()}
    widgets = {name: option["default"] for name, option in options.items() if "default" in option}
    assert {name: value for name, value in inversion.items() if name not in linked} == widgets
