"""Makes the pictures of the help pages from the thumbnails of the example workflows: `python tools/help_pictures.py`.

A page names the picture as ../pictures/WORKFLOW.jpg. Run it after `python tools/thumbnails.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

PACK = Path(__file__).resolve().parents[1]
DOCS = PACK / "web" / "docs"
PICTURES = PACK / "web" / "pictures"
PIXELS = 480 * 160
"""Of each picture: the help's panel is 346 pixels wide."""


def named() -> set[str]:
    """The workflows whose pictures the help pages show."""
    pages = (path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
    return {name for page in pages for name in re.findall(r"!\[[^]]+\]\(\.\./pictures/([\w-]+)\.jpg\)", page)}


def main() -> None:
    for name in named():
        thumbnail = Image.open(PACK / "workflows" / f"{name}.jpg")
        scale = (PIXELS / (thumbnail.width * thumbnail.height)) ** 0.5
        size = round(thumbnail.width * scale), round(thumbnail.height * scale)
        thumbnail.resize(size, Image.Resampling.LANCZOS).save(PICTURES / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
