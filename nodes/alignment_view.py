"""The words of Prompt Edit as its view in the frontend shows them: after a run, and while people type."""

from __future__ import annotations

import asyncio
import functools
import json
from typing import Any

import folder_paths
from aiohttp import web
from comfy.sd1_clip import SD1Tokenizer

from ..attention.alignment import ALIGNMENTS, resolve
from ..attention.word_pairs import told, word_pairs
from ..demo.model import WEIGHTS
from ..demo.tokenizer import DemoTokenizer, known_tokens
from ..host.quote import shortened
from ..host.run.tokens import Tokens, prompt_words, unknown_words
from ..host.words import Words

VIEW = "palimpsest_words"  # key among the outputs that the frontend is sent
LONGEST = 2000  # signs of a prompt; the time that an alignment takes grows with the square


def view(source: Words, target: Words, alignment: str, unknown: list[str]) -> dict[str, Any]:
    """What the frontend is sent, as JSON; `alignment` is resolved."""
    pairs = word_pairs(source, target, alignment)
    return {
        "alignment": alignment,
        "pairs": [{"source": pair.source, "target": pair.target, "state": pair.state} for pair in pairs],
        "unknown": unknown,
        "text": " ".join([told(pairs, alignment) + ".", *_warning(unknown)]),
    }


def outputs(source: Words, target: Words, alignment: str, unknown: list[str]) -> dict[str, list]:
    """The node's outputs for the frontend: its view, and the same in words."""
    shown = view(source, target, alignment, unknown)
    return {"text": [shown["text"]], VIEW: [shown]}


def _warning(unknown: list[str]) -> list[str]:
    named = shortened(", ".join(unknown), 200)
    return [f"The demo model does not know: {named}. See Demo Scene for its words."] if unknown else []


def view_of(prompts: tuple[str, str], alignment: str, demo: bool) -> dict[str, Any]:
    """The view of two prompts, without their text encoder: all CLIPs divide prompts alike."""
    clip, (source, target) = Tokens(_tokenizer(demo)), prompts
    source, target = prompt_words(clip, source, "source"), prompt_words(clip, target, "target")
    return view(source, target, resolve(source, target, alignment), unknown_words(clip, source, target))


@functools.cache
def _tokenizer(demo: bool) -> SD1Tokenizer:
    if demo:  # which has no textual inversions
        return DemoTokenizer(known_tokens(WEIGHTS))
    return SD1Tokenizer(folder_paths.get_folder_paths("embeddings"))


async def answer(request: web.Request) -> web.Response:
    """POST /palimpsest/alignment: {"source", "target", "alignment", "demo"} to a view, or 400 and one sentence."""
    try:
        asked = json.loads(await request.text())
        prompts, alignment, demo = (asked["source"], asked["target"]), asked["alignment"], asked["demo"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return _refused('The body has to be JSON with "source", "target", "alignment" and "demo".')
    if not all(map(_is_prompt, prompts)):
        return _refused(f"Source and target have to be texts of at most {LONGEST:,} signs.")
    if alignment not in ALIGNMENTS or not isinstance(demo, bool):
        return _refused(f"Alignment has to be one of {', '.join(ALIGNMENTS)}, and demo true or false.")
    try:
        return web.json_response(await asyncio.to_thread(view_of, prompts, alignment, demo))
    except ValueError as error:
        return _refused(str(error))


def _is_prompt(value: Any) -> bool:
    """JSON may hold halves of signs, which no tokenizer takes."""
    return isinstance(value, str) and len(value) <= LONGEST and value == value.encode(errors="ignore").decode()


def _refused(sentence: str) -> web.Response:
    return web.json_response({"error": sentence}, status=400)
