"""The demo model's tokenizer: the host's, which remembers the words that the text encoder was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from comfy.sd1_clip import SD1Tokenizer
from safetensors import safe_open


class DemoTokenizer(SD1Tokenizer):
    """known: the tokens of scene captions. All others stand for the same mean."""

    def __init__(self, known: Iterable[int], **options) -> None:
        super().__init__(**options)
        self.known = frozenset(known)


def known_tokens(weights: Path) -> list[int]:
    """Those of a file of the model's weights, which are not read."""
    with safe_open(weights, framework="pt") as file:
        return file.get_tensor("text.ids").tolist()
