"""What nodes show under themselves after a run, beside what they hand on."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

HIDDEN = [io.Hidden.extra_pnginfo]
"""What the schema of a node that tells has to ask for."""


def tell(node: type[io.ComfyNode], *outputs: Any, ui: Any) -> io.NodeOutput:
    """The node's output, with `ui` where a workflow is open that can show it.

    Clients that queue a prompt without its workflow are told nothing: some take the first node that shows anything for
    the end of the run, or for its result.
    """
    hidden = node.hidden
    is_seen = hidden is None or bool((hidden.extra_pnginfo or {}).get("workflow"))
    return io.NodeOutput(*outputs, ui=ui if is_seen else None)
