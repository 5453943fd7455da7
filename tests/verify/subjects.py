"""Clean artifacts of several tiny models, each with the base and the adapter that it must equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.cli.main import run


@dataclass(frozen=True)
class Subject:
    """An artifact on disk, read-only, and what it is to be."""

    path: Path
    base: Path
    adapter: Path

    def argv(self, artifact: Path, level: str) -> list[str]:
        """The command that judges ``artifact`` in the place of ``path``."""
        return [
            *("verify", str(artifact), "--reference", str(self.base), "--adapter", str(self.adapter)),
            *("--level", level, "-q"),
        ]


def make(base: Path, adapter: Path, out: Path, *words: str) -> Subject:
    """Merge, and do not verify: that is what is under test."""
    argv: Sequence[str] = ["merge", str(adapter), "--base", str(base), "--verify", "off", "-q", "-o", str(out), *words]
    assert run(argv) == 0
    return Subject(out, base, adapter)
