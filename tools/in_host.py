"""Run a module of the pack among the host's modules, without the server: `python tools/in_host.py MODULE [ARGS...]`.

COMFYUI_PATH names the host. The pack itself has to be importable as `palimpsest`; `dev.py` sees to both.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

BASE = Path(__file__).resolve().parents[1] / ".dev" / "base"


def prepare() -> None:
    """Makes the host's modules importable, set up by flags of ours in place of this process's own arguments."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    own = sys.argv
    sys.argv = ["comfyui", *host_flags()]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401
    finally:
        sys.argv = own


def host_flags() -> list[str]:
    import torch

    flags = ["--use-pytorch-cross-attention"]
    if BASE.is_dir():
        # Models, outputs and settings of a ComfyUI that someone works with stay as they are.
        flags += ["--base-directory", str(BASE)]
    if not torch.accelerator.is_available():
        flags.append("--cpu")
    return flags


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python tools/in_host.py MODULE [ARGS...]")
    prepare()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
