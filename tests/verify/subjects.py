"""Sound artifacts of several tiny models, each with its base and adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.cli.main import run


@dataclass(frozen=True)
class Subject:
    """A read-only artifact on disk, with its base and adapter."""

    path: Path
    base: Path
    adapter: Path

    def argv(self, artifact: Path, level: str) -> list[str]:
        """The arguments that verify ``artifact`` instead of ``path``."""
        return [
            *("verify", str(artifact), "--reference", str(self.base), "--adapter", str(self.adapter)),
            *("--level", level, "-q"),
        ]


def make(base: Path, adapter: Path, out: Path, *arguments: str) -> Subject:
    """Merge without verification, which is under test."""
    argv: Sequence[str] = [
        "merge",
        str(adapter),
        "--base",
        str(base),
        "--verify",
        "off",
        "-q",
        "-o",
        str(out),
        *arguments,
    ]
    assert run(argv) == 0
    return Subject(out, base, adapter)
