"""Text that is safe to print on a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with control characters and lone surrogates as escapes. Names may come from untrusted files."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
