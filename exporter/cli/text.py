"""Make text safe to print on a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return ``text`` with control characters and lone surrogates replaced by escape sequences.

    Escaping is needed because names from untrusted files may contain terminal control characters.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
