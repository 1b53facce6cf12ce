"""What people typed, as sentences quote it."""

from __future__ import annotations


def quoted(text: str, most: int = 60) -> str:
    """The first signs of a text on one line, in quotation marks."""
    return f"'{shortened(text, most)}'"


def shortened(text: str, most: int = 60) -> str:
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return line if len(line) <= most else line[:most] + "…"
