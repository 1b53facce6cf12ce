"""What people install from the registry: its metadata, and an archive that works and holds nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

import pytest
from comfy_config.config_parser import extract_node_configuration
from PIL import Image

ROOT = Path(__file__).parents[1]
CONFIG = extract_node_configuration(str(ROOT))
# Every module of the pack loads with its nodes, so one that does not is for development alone.
WORKS = """
from in_host import prepare
prepare()
import asyncio, sys
from pathlib import Path
import palimpsest

extension = asyncio.run(palimpsest.comfy_entrypoint())
asyncio.run(extension.get_node_list())
from palimpsest.demo import flow, model
model.load()
flow.load_flow()

folder = Path(palimpsest.__file__).parent
held = {path for path in folder.rglob("*.py")}
loaded = {Path(m.__file__) for name, m in list(sys.modules.items()) if name.split(".")[0] == "palimpsest"}
assert held == loaded, held ^ loaded
"""


def tracked(*options: str) -> set[str]:
    command = ["git", "ls-files", "-z", "--cached", *options]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(listed.split("\0")) - {""}


@pytest.fixture(scope="module")
def archive() -> set[str]:
    """The paths that `comfy node pack` puts into it."""
    return tracked() - tracked("--ignored", "--exclude-from=.comfyignore")


def test_it_holds_what_users_need_and_nothing_else(archive: set[str]) -> None:
    files = {"CHANGELOG.md", "GUIDE.md", "LICENSE", "README.md", "__init__.py", "pyproject.toml"}
    code = {"attention", "demo", "guidance", "host", "inversion", "metrics", "nodes"}
    served = {"locales", "subgraphs", "web", "workflows"}
    assert files | code <= {Path(path).parts[0] for path in archive} <= files | code | served
    suffixes = {".md", ".py", ".js", ".toml", ".json", ".jpg", ".png", ".safetensors"}
    assert {Path(path).suffix for path in archive - {"LICENSE"}} <= suffixes


def test_pictures_of_the_readme_are_in_it(archive: set[str]) -> None:
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert pictures
    assert set(pictures) <= archive


def test_it_works(archive: set[str], tmp_path: Path) -> None:
    for path in archive:
        target = tmp_path / "palimpsest" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, target)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{WORKS}"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tools")
    assert finished.returncode == 0, finished.stderr


def test_metadata_is_complete() -> None:
    project, comfy = CONFIG.project, CONFIG.tool_comfy
    assert (project.name, comfy.publisher_id, comfy.display_name) == ("palimpsest", "palimpsest", "Palimpsest")
    assert re.fullmatch(r"\d+\.\d+\.\d+", project.version)
    assert project.dependencies == []
    assert project.supported_os == ["OS Independent"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", project.supported_comfyui_version)
    oldest = project.supported_comfyui_version.removeprefix(">=")
    assert f"ComfyUI {oldest} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_changelog_begins_with_this_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first[1] == CONFIG.project.version


def size_of(key: str) -> tuple[int, int]:
    """Width and height of the file behind an address of our own repository."""
    (address,) = re.findall(rf'^{key} = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    _, owner, name, branch, *path = urlparse(address).path.split("/")
    assert (f"https://github.com/{owner}/{name}", branch) == (CONFIG.project.urls.repository, "main")
    with Image.open(ROOT.joinpath(*path)) as image:
        return image.size


def test_icon_and_banner_have_the_registry_s_sizes() -> None:
    (icon_width, icon_height), (width, height) = size_of("Icon"), size_of("Banner")
    assert icon_width == icon_height <= 400
    assert width * 9 == height * 21
