"""The nodes and their help in other languages: nothing missing, left over, untranslated or older than the English."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from palimpsest.nodes.extension import NODES
from translated_help import DOCS, LANGUAGES, current, first_paragraph, node_definitions

TRANSLATED = Path(__file__).with_name("translated.json")
SCRIPTS = {"ja": r"[\u3040-\u30ff\u4e00-\u9fff]", "ko": r"[\uac00-\ud7a3]", "zh": r"[\u4e00-\u9fff]"}
# Names of methods, and symbols of papers.
THE_SAME_IN_ALL = {"MasaCtrl", "alpha", "eta", "tau_a", "tau_f"}
NUMBER = r"\d+(?:[.,]\d+)*"

each_language = pytest.mark.parametrize("language", LANGUAGES)

Texts = dict[tuple[str, ...], str]
"""By path, such as ("PalimpsestMasaCtrl", "inputs", "start", "tooltip")."""


def in_english() -> dict[str, dict[str, Any]]:
    """The schemas in the form of locales/LANGUAGE/nodeDefs.json, and the help's first paragraphs."""
    schemas = [node.GET_SCHEMA() for node in NODES]
    return {
        schema.node_id: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {i.id: {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs},
            "outputs": {
                str(index): {"name": output.display_name or output.id, "tooltip": output.tooltip}
                for index, output in enumerate(schema.outputs)
            },
            "help": first_paragraph((DOCS / f"{schema.node_id}.md").read_text(encoding="utf-8")),
        }
        for schema in schemas
    }


def translation(language: str) -> dict[str, dict[str, Any]]:
    return {
        node_id: {**node, "help": first_paragraph((DOCS / node_id / f"{language}.md").read_text(encoding="utf-8"))}
        for node_id, node in node_definitions(language).items()
    }


def texts(tree: dict[str, Any], *path: str) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from texts(value, *path, key)
        else:
            yield (*path, key), value


ENGLISH: Texts = dict(texts(in_english()))


@each_language
def test_no_key_is_missing_or_left_over(language: str) -> None:
    keys = dict(texts(translation(language))).keys()
    missing, left_over = ENGLISH.keys() - keys, keys - ENGLISH.keys()
    assert (missing, left_over) == (set(), set()), f"locales/{language}/nodeDefs.json: {missing=}, {left_over=}"


@each_language
def test_nothing_is_left_in_english(language: str) -> None:
    """Texts are in the language's own letters; names may also be abbreviations, such as VAE."""
    for path, text in texts(translation(language)):
        if path[-1] in ("name", "display_name"):
            assert text != ENGLISH[path] or text in THE_SAME_IN_ALL, (language, path)
        else:
            assert re.search(SCRIPTS[language], text), (language, path, text)


@each_language
def test_nodes_and_slots_have_names_of_their_own(language: str) -> None:
    nodes = node_definitions(language)
    assert len({node["display_name"] for node in nodes.values()}) == len(nodes)
    for node in nodes.values():
        for slots in (node["inputs"], node["outputs"]):
            assert len({slot["name"] for slot in slots.values()}) == len(slots), (language, node["display_name"])


@each_language
def test_numbers_are_those_of_the_english(language: str) -> None:
    for path, text in texts(translation(language)):
        assert set(re.findall(NUMBER, ENGLISH[path])) <= set(re.findall(NUMBER, text)), (language, path, text)


@each_language
def test_the_frontend_shows_every_sign(language: str) -> None:
    """To its messages these are syntax: | separates plurals, @ links, braces are parameters."""
    for path, text in texts(node_definitions(language)):
        assert not set("{}@|\n") & set(text), (language, path, text)


def test_no_translation_is_older_than_its_english(tmp_path: Path) -> None:
    was = dict(texts(json.loads(TRANSLATED.read_text(encoding="utf-8"))))
    changed = ["/".join(path) for path in ENGLISH.keys() | was.keys() if ENGLISH.get(path) != was.get(path)]
    if changed:
        now = tmp_path / TRANSLATED.name
        now.write_text(json.dumps(in_english(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        pytest.fail(
            f"translate anew {sorted(changed)}: in locales/*/nodeDefs.json, help in the first paragraphs of "
            f"web/docs/NODE/*.md. Then copy {now}, the English that is translated, to {TRANSLATED}"
        )


@each_language
def test_help_pages_are_up_to_date(language: str) -> None:
    pages = {path.parent.name for path in DOCS.glob(f"*/{language}.md")}
    assert pages == node_definitions(language).keys()
    old = [page for page in pages if (DOCS / page / f"{language}.md").read_text("utf-8") != current(page, language)]
    assert old == [], "run `python tools/translated_help.py`"
