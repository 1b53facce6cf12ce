"""Makes the pictures of the example workflows anew, by running them: `python tools/thumbnails.py [WORKFLOW ...]`.

Every workflow gets its thumbnail; the one that opens the README also a PNG that carries it, as the host's own do:
dropped on the graph editor, it opens the workflow. Those that need a download show what the same edit came to on a demo
model, without its answer. COMFYUI_PATH names the host, such as `.dev/ComfyUI`.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

PACK = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PACK / "tests"))

from example_workflows import FIRST, WITHOUT_DOWNLOAD, api_form, ui_form  # noqa: E402
from host_server import HostServer  # noqa: E402

WIDTH = 600
THE_SAME = {"edit-photo": FIRST, "flow-edit-photo": "flow-edit"}
PANELS = 3
"""In the thumbnail of an edit: source, edit and answer."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, HostServer(Path(folder)) as server:
        for name in sys.argv[1:] or WITHOUT_DOWNLOAD:
            start = time.monotonic()
            run = server.run(api_form(name))
            if run.errors:
                sys.exit(f"{name}: {run.errors}")
            pictures = [Image.open(io.BytesIO(server.view(image))) for image in run.images()]
            row = fitted(beside(pictures))
            path = thumbnail(name)
            row.save(path, quality=90)
            for other in (other for other, same in THE_SAME.items() if same == name):
                without_answer = row.crop((0, 0, round(WIDTH * (PANELS - 1) / PANELS), row.height))
                fitted(without_answer).save(thumbnail(other), quality=90)
            if name == FIRST:
                row.save(PACK / "web" / "pictures" / f"{name}.png", pnginfo=carrying(name))
            print(f"{path} ({time.monotonic() - start:.0f} s)", flush=True)


def thumbnail(name: str) -> Path:
    return PACK / "workflows" / f"{name}.jpg"


def fitted(row: Image.Image) -> Image.Image:
    return row.resize((WIDTH, round(row.height * WIDTH / row.width)), Image.Resampling.LANCZOS)


def carrying(name: str) -> PngInfo:
    """A workflow as the host writes it into the pictures that it saves."""
    info = PngInfo()
    info.add_text("prompt", json.dumps(api_form(name)))
    info.add_text("workflow", json.dumps(ui_form(name)))
    return info


def beside(pictures: list[Image.Image]) -> Image.Image:
    """The pictures of a batch in one row."""
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for index, picture in enumerate(pictures):
        row.paste(picture, (index * width, 0))
    return row


if __name__ == "__main__":
    main()
