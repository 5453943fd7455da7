"""Defines the callbacks that report the progress of long jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

#: Called with the number of bytes processed since the last call.
Progress = Callable[[int], None]


def silent(nbytes: int) -> None:
    """Do nothing: the ``Progress`` callback for callers that show no progress."""


@dataclass(frozen=True)
class Hooks:
    """Functions that show progress. The function ``start(label, nbytes)`` starts the progress bar of an artifact.

    The function ``say`` shows the user one line of text.
    """

    start: Callable[[str, int], Progress] = field(default=lambda label, nbytes: silent)
    say: Callable[[str], None] = field(default=lambda line: None)
