"""The pack as the host imports it: light, and leaving the host as it was."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[1]
FLOORS = (
    ("host/layer.py", "host/quote.py", "host/words.py"),
    ("host/files",),
    ("host/unet", "host/dit"),
    ("host/run",),
    ("host/branch",),
    ("attention", "guidance", "inversion"),
    ("nodes",),
)
"""From the lowest to the highest: what stands on one imports nothing of those above."""
LIGHT = """
import sys
import palimpsest
import palimpsest.attention.p2p, palimpsest.attention.alignment
import palimpsest.host.files.trajectory, palimpsest.host.words, palimpsest.inversion.ddim
import palimpsest.inversion.fixed_point, palimpsest.inversion.regularise
import palimpsest.inversion.edit_friendly, palimpsest.inversion.turbo_edit, palimpsest.inversion.edict
import palimpsest.inversion.dpm_solver, palimpsest.inversion.obelm, palimpsest.inversion.uni_inv
import palimpsest.guidance.negative_prompt, palimpsest.guidance.proximal, palimpsest.guidance.cross_attention
import palimpsest.guidance.direction, palimpsest.guidance.sentences, palimpsest.guidance.rf_inversion
import palimpsest.guidance.concepts, palimpsest.guidance.uni_edit, palimpsest.attention.masactrl
import palimpsest.guidance.clip_guidance, palimpsest.guidance.h_space
import palimpsest.guidance.instruct
hosts = sorted(name for name in sys.modules if name.split(".")[0] in ("comfy", "comfy_api", "nodes", "server"))
assert not hosts, hosts
"""
CLEAN = """
from in_host import prepare
prepare()
import asyncio, sys
import nodes, server  # bring what the host has loaded before it comes to the packs
import comfy.samplers, comfy.model_patcher, comfy.model_base, comfy.sd, comfy.ldm.modules.attention
import folder_paths, latent_preview
from comfy_api.latest import io

def symbols():
    host = [m for name, m in sys.modules.items() if name.split(".")[0] in ("comfy", "comfy_api", "folder_paths")]
    found = {}
    for module in host:
        for name, value in vars(module).items():
            found[module.__name__, name] = id(value)
            if isinstance(value, type) and value.__module__ == module.__name__:
                found.update({(module.__name__, name, k): id(v) for k, v in vars(value).items() if callable(v)})
    return found

before, loaded = symbols(), set(sys.modules)
import palimpsest
for name in palimpsest.API:
    getattr(palimpsest, name)
assert not any(name.startswith("palimpsest.nodes") for name in sys.modules)
extension = asyncio.run(palimpsest.comfy_entrypoint())
schemas = [node.GET_SCHEMA() for node in asyncio.run(extension.get_node_list())]
assert schemas
# Seconds of a start are spent in libraries: the pack brings none that the host has not loaded by then.
brought = {name.split(".")[0] for name in sys.modules.keys() - loaded} - {"palimpsest", "comfy_api", "comfy"}
assert not brought, brought
after = symbols()
# Importing further host modules (safetensors helpers, say) adds symbols; none that was there may change.
changed = [name for name, value in before.items() if after.get(name) != value]
assert not changed, changed
"""


def run(code: str) -> None:
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="tools")
    assert finished.returncode == 0, finished.stderr


def test_the_mathematics_imports_without_the_host() -> None:
    run(LIGHT)


def test_importing_the_pack_brings_no_library_and_changes_no_host_symbol() -> None:
    run(CLEAN)


def floor(path: Path) -> int:
    """Of a file or module of the pack; -1 for what stands beside them."""
    name = f"{path.relative_to(PACK).with_suffix('').as_posix()}/"
    at = [n for n, rooms in enumerate(FLOORS) if any(name.startswith(f"{room.removesuffix('.py')}/") for room in rooms)]
    return at[0] if at else -1


def imported(file: Path) -> Iterator[Path]:
    """The pack's own modules that a file imports, and the names that it takes from them."""
    for statement in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.ImportFrom) and statement.level:
            module = file.parents[statement.level - 1] / (statement.module or "").replace(".", "/")
            yield from (module / name.name for name in statement.names)


@pytest.mark.parametrize("room", [room for rooms in FLOORS for room in rooms])
def test_imports_go_down(room: str) -> None:
    files = [PACK / room] if room.endswith(".py") else [*(PACK / room).glob("*.py")]
    assert files
    for file in files:
        up = [name for name in imported(file) if floor(name) > floor(file)]
        assert not up, f"{file} imports {up}"
