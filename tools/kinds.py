"""Makes `web/pictures/kinds.jpg`, an edit of every kind beside its one true answer: `python tools/kinds.py`.

The edits are those of the workflow `edit-real-image` with other captions. COMFYUI_PATH names the host, such as
`.dev/ComfyUI`.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

PACK = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PACK / "tests"))

from example_workflows import FIRST, api_form  # noqa: E402
from host_server import HostServer, Prompt  # noqa: E402

CAPTIONS = (
    ("object", "a photo of a cat on a meadow", "a photo of a dog on a meadow", 0),
    ("add", "a photo of a cat on a meadow", "a photo of a cat with a hat on a meadow", 0),
    ("delete", "a photo of a cat with a hat on a meadow", "a photo of a cat on a meadow", 0),
    ("content", "a photo of a cup in a room", "a photo of a cup of coffee in a room", 0),
    ("pose", "a photo of a cat on a meadow", "a photo of a sleeping cat on a meadow", 0),
    ("colour", "a photo of a red car on a street", "a photo of a blue car on a street", 1),
    ("material", "a photo of a stone house on a meadow", "a photo of a wooden house on a meadow", 0),
    ("background", "a photo of a red house in the snow", "a photo of a red house in a desert", 3),
    ("time", "a photo of a cat on a meadow", "a photo of a cat on a meadow at sunset", 0),
    ("style", "a photo of a cat on a meadow", "a watercolor of a cat on a meadow", 0),
)
SIDE, TEXT, GAP, COLUMNS = 128, 32, 12, 2


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, HostServer(Path(folder)) as server:
        rows = [(row, edited(server, *row[1:])) for row in CAPTIONS]
    width, height = 3 * SIDE + GAP, TEXT + SIDE + GAP
    page = Image.new("RGB", (COLUMNS * width, -(-len(rows) // COLUMNS) * height), "white")
    draw = ImageDraw.Draw(page)
    for number, ((kind, source, target, _), picture) in enumerate(rows):
        x, y = number % COLUMNS * width, number // COLUMNS * height
        draw.text((x + 2, y + 2), f"{kind}: {source}\n{target}", fill="black")
        page.paste(picture, (x, y + TEXT))
    page.save(PACK / "web" / "pictures" / "kinds.jpg", quality=90)


def edited(server: HostServer, source: str, target: str, seed: int) -> Image.Image:
    """The source, its edit and the true answer in one row, as the workflow saves them."""
    prompt: Prompt = api_form(FIRST)
    (scene,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "PalimpsestDemoScene")
    scene |= {"caption": source, "edited_caption": target, "seed": seed}
    run = server.run(prompt)
    if run.errors:
        sys.exit(f"{source}: {run.errors}")
    (saved,) = run.images()
    picture = Image.open(io.BytesIO(server.view(saved)))
    return picture.resize((3 * SIDE, round(3 * SIDE * picture.height / picture.width)), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
