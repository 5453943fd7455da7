"""Progress callbacks of long jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

#: Called with the number of bytes processed since the last call.
Progress = Callable[[int], None]


def silent(nbytes: int) -> None:
    """A ``Progress`` that shows nothing."""


@dataclass(frozen=True)
class Hooks:
    """Functions that show progress. ``start(label, nbytes)`` starts the bar of one artifact.

    ``say`` prints one line.
    """

    start: Callable[[str, int], Progress] = field(default=lambda label, nbytes: silent)
    say: Callable[[str], None] = field(default=lambda line: None)
