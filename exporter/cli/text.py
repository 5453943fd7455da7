"""Text for people: names that are safe to show, sizes that can be read."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with what a terminal would obey, and half characters, as escapes: names come from files of others."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def size(nbytes: int) -> str:
    """A number of bytes for people: 269.1 MB."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
