"""Palimpsest: edit real images by rewriting their prompts. This is the host's entry point and nothing else."""

from __future__ import annotations

import importlib

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The host calls this once; the nodes load only then, so that the mathematics can be imported without the host."""
    return importlib.import_module(".nodes.extension", __name__).Palimpsest()
