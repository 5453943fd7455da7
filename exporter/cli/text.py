"""Text for people: names that are safe to show."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with what a terminal would obey, and half characters, as escapes: names come from files of others."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
