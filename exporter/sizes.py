"""Converts sizes in bytes to text and text to sizes in bytes."""

from __future__ import annotations

import re
from typing import Final

#: Exponents of the units. The base is 1000, as for disks, or 1024 if the unit has an ``i``.
_POWERS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE: Final = re.compile(
    r"(?P<number>\d{1,9}(?:\.\d{1,9})?)\s*(?:(?P<prefix>[kmgt])(?P<binary>i?)b?|b)", re.IGNORECASE
)


def parse_size(text: str) -> int:
    """Parse a size such as ``500M``, ``2GB`` or ``1.5GiB`` and return the number of bytes, at least 1.

    ``2G`` equals ``2GB``. Raises ValueError if ``text`` is not a valid size.
    """
    match = _SIZE.fullmatch(text.strip())
    nbytes = 0
    if match:
        base = 1024 if match["binary"] else 1000
        nbytes = int(float(match["number"]) * base ** _POWERS[(match["prefix"] or "").lower()])
    if nbytes < 1:
        raise ValueError(f"expected a size such as 500M, 2GB or 1.5GiB, found {text!r:.80}")
    return nbytes


def format_size(nbytes: int) -> str:
    """Format a number of bytes as text, such as ``269.1 MB``."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
