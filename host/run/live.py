"""What a node shows under itself while a run goes on: a line of text, or pictures, the host's own previews.

Pictures are drawn by a node that has run, while a sampler runs what it made.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from comfy_execution.progress import get_progress_state
from PIL import Image
from torch import Tensor

SIDE = 256  # pixels of the longer side
PAUSE = 0.2  # seconds between two pictures
SHARE = 0.02  # of the time, at most, goes into drawing them


class Live:
    """One node, known by its id in the prompt that runs."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self.next = 0.0  # when there is time for another picture

    def say(self, text: str) -> None:
        """Sends a line of text, which stays until the node runs again."""
        web = get_progress_state().handlers.get("webui")
        if web is not None:  # there is no server where the nodes are called from Python
            web.server_instance.send_progress_text(text, self.node_id, web.server_instance.client_id)

    def show(self, draw: Callable[[], Tensor]) -> None:
        """Sends the picture [h, w, 3] in 0..1 that `draw` makes, unless the last one was sent only just now."""
        began = time.perf_counter()
        registry = get_progress_state()
        web = registry.handlers.get("webui")
        if web is None or began < self.next:
            return
        pixels = draw().mul(255).round().to("cpu", torch.uint8).numpy()
        picture = "JPEG", Image.fromarray(pixels), SIDE
        state = registry.ensure_entry(self.node_id)
        # The handler, not the registry: that would take the node for one that runs.
        web.update_handler(self.node_id, state["value"], state["max"], state, registry.prompt_id, picture)
        ended = time.perf_counter()
        self.next = ended + max(PAUSE, (ended - began) / SHARE)
