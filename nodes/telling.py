"""What nodes show under themselves after a run, beside what they hand on."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host.run.live import Live

HIDDEN = [io.Hidden.extra_pnginfo]
"""What the schema of a node that tells has to ask for."""
SAYING = [*HIDDEN, io.Hidden.unique_id]
"""And of one that also says something while it runs."""


def tell(node: type[io.ComfyNode], *outputs: Any, ui: Any) -> io.NodeOutput:
    """The node's output, with `ui` where a workflow is open that can show it.

    Clients that queue a prompt without its workflow are told nothing: some take the first node that shows anything for
    the end of the run, or for its result.
    """
    return io.NodeOutput(*outputs, ui=ui if node.hidden is None or _is_seen(node) else None)


def say(node: type[io.ComfyNode], text: str) -> None:
    """Shows a text under the node while it runs, to the same clients."""
    if node.hidden is not None and _is_seen(node):
        Live(node.hidden.unique_id).say(text)


def _is_seen(node: type[io.ComfyNode]) -> bool:
    return bool((node.hidden.extra_pnginfo or {}).get("workflow"))
