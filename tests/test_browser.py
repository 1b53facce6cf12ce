"""The example workflows in the host's real frontend, used as a person would."""

from __future__ import annotations

from pathlib import Path

import pytest

from browser import Page
from example_workflows import COMPARER, WITHOUT_DOWNLOAD, api_form, overlaps, ui_form
from host_server import HostServer, Prompt

RUN_BUTTON = "[data-testid=queue-button]"
STEPS = 8  # not as many as in test_workflows.py, whose results the server still holds
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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "null-text" else ()) for name in WITHOUT_DOWNLOAD]
)
def test_opens_and_runs(page: Page, server: HostServer, name: str, tmp_path: Path) -> None:
    before = server.get_json("/history")
    open_template(page, server, name)
    assert unknown_nodes(page) == []
    assert complaints(page) == []
    set_steps(page, STEPS)
    assert converted(page) == api_form(name, STEPS)

    page.click(RUN_BUTTON)
    page.wait_for(f"({NODES}).find(node => node.type === 'SaveImage').imgs?.[0]?.naturalWidth > 0", seconds=120)
    page.screenshot(tmp_path / f"{name}.png")
    (prompt_id,) = server.get_json("/history").keys() - before.keys()
    run = server.finished(prompt_id)
    assert not run.errors
    assert run.images()
    assert complaints(page) == []
    assert overlaps(page.evaluate("app.rootGraph.serialize().nodes")) == []
    assert [error for error in page.errors if not error.startswith(HARMLESS)] == []
