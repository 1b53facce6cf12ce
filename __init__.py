"""Palimpsest: edit real images by rewriting their prompts. The host's entry point, and the names of the Python API."""

from __future__ import annotations

import importlib
from typing import Any

WEB_DIRECTORY = "./web"

API = {
    "Guidance": "inversion.run",
    "PRESETS": "attention.p2p",
    "Settings": "attention.p2p",
    "Trajectory": "host.files.trajectory",
    "Window": "attention.p2p",
    "attach": "host.branch.source",
    "ddim_sigmas": "inversion.run",
    "invert": "inversion.run",
    "prompt_to_prompt": "attention.editing",
    "record": "inversion.run",
    "resample": "inversion.run",
    "rewrite": "attention.editing",
}
"""What `from palimpsest import ...` gives, and where it is."""


def __getattr__(name: str) -> Any:
    """A name of the API: its module loads only now, so that the mathematics can be imported without the host."""
    if name not in API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{API[name]}", __name__), name)


async def comfy_entrypoint():
    """The host calls this once; the nodes load only then, for the same reason."""
    return importlib.import_module(".nodes.extension", __name__).Palimpsest()
