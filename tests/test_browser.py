"""The example workflows in the host's real frontend, used as a person would."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from browser import Page
from example_workflows import COMPARER, FIRST, WITHOUT_DOWNLOAD, api_form, overlaps, ui_form
from host_server import HostServer, Prompt, Run

RUN_BUTTON = "[data-testid=queue-button]"
STEPS = 8  # not as many as in test_workflows.py, whose results the server still holds
OPTIMISING = ("null-text", "stylediffusion")
NODES = "window.app?.isGraphReady ? app.rootGraph.nodes : []"
# The frontend opens its own default workflow before the one asked for, and may complain of that one's models till then.
SETTLED = "!app.extensionManager.spinner"
# Whatever the frontend lays over the page to say that something is wrong.
COMPLAINTS = "[role=dialog], .p-toast-message, [data-testid=error-overlay], [data-testid^=missing-]"
# It says the first in every session; the others where ComfyUI's own templates, a package apart, are not installed.
HARMLESS = (
    "ComfyApp graph accessed before initialization",
    "Error loading core workflow templates",
    "Error loading fuse options",
)

DROP = """(async () => {
    const picture = await fetch('/extensions/palimpsest/pictures/%s.png').then(answer => answer.blob())
    const dataTransfer = new DataTransfer()
    dataTransfer.items.add(new File([picture], 'picture.png', {type: 'image/png'}))
    document.dispatchEvent(new DragEvent('drop', {dataTransfer, bubbles: true, cancelable: true}))
})()"""


def open_template(page: Page, server: HostServer, name: str) -> None:
    page.open(f"{server.url}/?template={name}&source=palimpsest")
    page.wait_for(f"({NODES}).length === {len(ui_form(name)['nodes'])} && {SETTLED}", seconds=90)


def set_steps(page: Page, steps: int) -> None:
    page.evaluate(
        f"for (const node of {NODES}) for (const widget of node.widgets ?? [])"
        f"if (widget.name === 'steps') {{ widget.value = {steps}; widget.callback?.({steps}) }}"
    )


def complaints(page: Page) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll('{COMPLAINTS}')].map(element => element.innerText)")


def unknown_nodes(page: Page) -> list[str]:
    return page.evaluate(f"({NODES}).map(node => node.type).filter(type => !(type in LiteGraph.registered_node_types))")


def converted(page: Page) -> Prompt:
    """What the Run button sends."""
    prompt = page.evaluate("app.graphToPrompt().then(prompt => prompt.output)")
    for node in prompt.values():
        if "compare_view" in node["inputs"]:  # frontends write it each in their own way
            node["inputs"]["compare_view"] = COMPARER
    return prompt


def run_since(server: HostServer, before: dict) -> Run:
    """The one run that the history has besides `before`: a picture is shown while its run has yet to end."""
    end = time.monotonic() + 60
    while not (new := server.get_json("/history").keys() - before.keys()):
        assert time.monotonic() < end
        time.sleep(0.2)
    (prompt_id,) = new
    return server.finished(prompt_id)


def test_the_readmes_first_picture_opens_its_workflow_where_it_is_dropped(page: Page, server: HostServer) -> None:
    open_template(page, server, "several-targets")
    page.evaluate(DROP % FIRST)
    page.wait_for(f"({NODES}).length === {len(ui_form(FIRST)['nodes'])} && {SETTLED}")
    assert converted(page) == api_form(FIRST)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in OPTIMISING else ()) for name in WITHOUT_DOWNLOAD]
)
def test_opens_and_runs(page: Page, server: HostServer, name: str, tmp_path: Path) -> None:
    before = server.get_json("/history")
    open_template(page, server, name)
    assert unknown_nodes(page) == []
    assert complaints(page) == []
    assert overlaps(page.evaluate("app.rootGraph.serialize().nodes")) == []  # live previews make nodes longer later
    set_steps(page, STEPS)
    assert converted(page) == api_form(name, STEPS)

    page.click(RUN_BUTTON)
    page.wait_for(f"({NODES}).find(node => node.type === 'SaveImage').imgs?.[0]?.naturalWidth > 0", seconds=120)
    page.screenshot(tmp_path / f"{name}.png")
    run = run_since(server, before)
    assert not run.errors
    assert run.images()
    assert complaints(page) == []
    assert [error for error in page.errors if not error.startswith(HARMLESS)] == []


def press(page: Page, key: str, code: int) -> None:
    for kind in ("keyDown", "keyUp"):
        page.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


def click_canvas(page: Page, count: int = 1) -> None:
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=900, y=500, button="none")
    for kind in ("mousePressed", "mouseReleased"):
        page.send("Input.dispatchMouseEvent", type=kind, x=900, y=500, button="left", clickCount=count)


def find_node(page: Page, text: str) -> None:
    """Opens the search by a double click on the canvas, types, and takes the first answer."""
    page.evaluate("new Promise(resolve => setTimeout(resolve, 3000))")  # for clicks on it to be heard
    for count in (1, 2):
        click_canvas(page, count)
    page.wait_for("document.activeElement?.tagName === 'INPUT'")
    page.send("Input.insertText", text=text)
    page.wait_for(f"document.body.innerText.includes({text!r})")
    page.evaluate("new Promise(resolve => setTimeout(resolve, 1000))")  # the list follows what is typed
    press(page, "Enter", 13)
    page.wait_for(f"({NODES}).length === 1")
    click_canvas(page)  # where it is to stand


CONNECT = """(() => {
    const [block] = app.rootGraph.nodes;
    const made = type => { const node = LiteGraph.createNode(type); app.rootGraph.add(node); return node; };
    const [model, scene, save] = ["PalimpsestLoadDemoModel", "PalimpsestDemoScene", "SaveImage"].map(made);
    const input = (node, name) => node.inputs.findIndex(slot => slot.name === name);
    ["model", "clip", "vae"].forEach((name, slot) => model.connect(slot, block, input(block, name)));
    scene.connect(0, block, input(block, "image"));
    block.connect(0, save, input(save, "images"));
    const widget = (node, name) => node.widgets.find(widget => widget.name === name);
    widget(block, "source_prompt").value = widget(scene, "caption").value;
    widget(block, "target_prompt").value = widget(scene, "edited_caption").value;
    widget(block, "steps").value = 4;
    return [...app.rootGraph.links.values()].length;
})()"""


def place_block(page: Page, server: HostServer) -> None:
    """Finds the block from an empty canvas, and wires it to the demo model and a scene."""
    page.open(server.url)
    page.wait_for(f"window.app?.isGraphReady && {SETTLED}", seconds=90)
    page.evaluate("app.rootGraph.clear()")
    find_node(page, "Edit Image by Prompt")
    labels = page.evaluate("app.rootGraph.nodes[0].inputs.map(slot => slot.label ?? slot.name)")
    assert labels[3:] == [
        "image",
        "source prompt: what it shows",
        "target prompt: what it should show",
        "cfg: how strong",
        "steps",
    ]
    assert page.evaluate(CONNECT) == 5


def test_the_block_edits_from_an_empty_canvas(page: Page, server: HostServer, tmp_path: Path) -> None:
    before = server.get_json("/history")
    place_block(page, server)
    page.click(RUN_BUTTON)
    page.wait_for(f"({NODES}).find(node => node.type === 'SaveImage').imgs?.[0]?.naturalWidth > 0", seconds=120)
    page.screenshot(tmp_path / "block.png")
    assert not run_since(server, before).errors
    assert complaints(page) == []


def test_bad_input_in_the_block_is_told_by_its_own_name(page: Page, server: HostServer) -> None:
    before = server.get_json("/history")
    place_block(page, server)
    page.evaluate("app.rootGraph.nodes[0].widgets.find(widget => widget.name === 'source_prompt').value = ' '")
    page.click(RUN_BUTTON)
    (error,) = run_since(server, before).errors
    assert "The source prompt is empty" in error
    page.wait_for(f"document.querySelector('{COMPLAINTS}') !== null")
