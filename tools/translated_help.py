"""Help pages in the languages of locales/: `python tools/translated_help.py` writes web/docs/NODE/LANGUAGE.md.

The host shows such a page in place of the English one. Its first paragraph is translated by hand, in the page itself;
names and tooltips come from locales/, and everything else is that of the English page.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "web" / "docs"
LOCALES = ROOT / "locales"
LANGUAGES = tuple(sorted(path.name for path in LOCALES.iterdir()))

HEADINGS = {
    "ja": {"Inputs": "入力", "Outputs": "出力", "Name": "名前", "What it is": "説明"},
    "ko": {"Inputs": "입력", "Outputs": "출력", "Name": "이름", "What it is": "설명"},
    "zh": {"Inputs": "输入", "Outputs": "输出", "Name": "名称", "What it is": "说明"},
}
ROW = re.compile(r"^\| `(\w+)` \| .* \|$", re.MULTILINE)


def node_definitions(language: str) -> dict[str, dict[str, Any]]:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def translated_page(english: str, paragraph: str, node: dict[str, Any], language: str) -> str:
    """Rows begin with the name that messages and workflows use, the English one, and the one on the translated node."""
    words = HEADINGS[language]
    slots = [*node["inputs"].values(), *node["outputs"].values()]
    _, _, rest = english.split("\n\n", 2)
    rows = iter(slots)

    def row(found: re.Match[str]) -> str:
        slot = next(rows)
        name = "" if slot["name"] == found[1] else f" {slot['name']}"
        return f"| `{found[1]}`{name} | {slot['tooltip']} |"

    rest = ROW.sub(row, rest)
    rest = rest.replace("| Name | What it is |", f"| {words['Name']} | {words['What it is']} |")
    for heading in ("Inputs", "Outputs"):
        rest = rest.replace(f"## {heading}\n", f"## {words[heading]}\n")
    return f"# {node['display_name']}\n\n{paragraph}\n\n{rest}"


def first_paragraph(page: str) -> str:
    return page.split("\n\n")[1].strip()


def current(node_id: str, language: str) -> str:
    """What the page should be, with the first paragraph that it has."""
    english = (DOCS / f"{node_id}.md").read_text(encoding="utf-8")
    translated = (DOCS / node_id / f"{language}.md").read_text(encoding="utf-8")
    return translated_page(english, first_paragraph(translated), node_definitions(language)[node_id], language)


def main() -> None:
    for language in LANGUAGES:
        for node_id in node_definitions(language):
            (DOCS / node_id / f"{language}.md").write_text(current(node_id, language), encoding="utf-8")


if __name__ == "__main__":
    main()
