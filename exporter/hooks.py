"""Where a long job tells how far it is: the one thing that the jobs and the command line share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from exporter.formats.output import Progress, silent


@dataclass(frozen=True)
class Hooks:
    """Where progress goes: ``start(label, nbytes)`` gives the meter of one artifact, ``say`` a line of talk."""

    start: Callable[[str, int], Progress] = field(default=lambda label, nbytes: silent)
    say: Callable[[str], None] = field(default=lambda line: None)
