"""Progress callbacks: what a long job reports, and where to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

#: Called with the number of bytes that were processed since the last call.
Progress = Callable[[int], None]


def silent(nbytes: int) -> None:
    """A ``Progress`` for callers that show none."""


@dataclass(frozen=True)
class Hooks:
    """Where progress goes: ``start(label, nbytes)`` gives the meter of one artifact, ``say`` prints one line."""

    start: Callable[[str, int], Progress] = field(default=lambda label, nbytes: silent)
    say: Callable[[str], None] = field(default=lambda line: None)
