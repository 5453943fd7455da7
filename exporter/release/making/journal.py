"""What an unfinished release has done: a line for each finished job and each verified model, synced one by one.

A line counts only if it is whole and the files that it tells of are there, byte for byte; all other files go.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from exporter.errors import reading, writing
from exporter.io.digests import FileDigests, files_below


class Made(msgspec.Struct, frozen=True, kw_only=True, tag="made"):
    """A finished job. key: of the inputs. files: name below the release → sha256. method: how it was made.

    seconds: for making it; hashing and verification come on top.
    """

    job: str
    key: str
    files: dict[str, str]
    seconds: float
    method: str


class Verified(msgspec.Struct, frozen=True, kw_only=True, tag="verified"):
    """Artifacts that passed together: job → key, and job → its report as report.json has it.

    verification: digest of its settings; what the artifacts were made of is in the keys.
    """

    model: str
    verification: str
    keys: dict[str, str]
    reports: dict[str, dict[str, Any]]
    seconds: float


Line = Made | Verified


@dataclass
class Journal:
    """The lines of the file at ``path``, by what they are about."""

    path: Path
    made: dict[str, Made] = field(default_factory=dict)
    verified: dict[str, Verified] = field(default_factory=dict)

    @classmethod
    def open(
        cls, path: Path, draft: Path, keys: Mapping[str, str], verifications: Mapping[str, str], digests: FileDigests
    ) -> Journal:
        """Read the journal, if there is one; keep what is of the jobs ``keys`` (job → key) and true of ``draft``.

        verifications: model → digest of its settings; recorded verifications with other settings, or of
        other models, are dropped.
        What lies in ``draft`` beside is removed. Raises UnreadableFile, OutputError.
        """
        journal = cls(path)
        for line in _lines(path):
            if isinstance(line, Made):
                if keys.get(line.job) == line.key and _holds(draft, line.files, digests):
                    journal.made[line.job] = line
            else:
                journal.verified[line.model] = line
        known = {name for line in journal.made.values() for name in line.files}
        with writing(draft):
            for file in files_below(draft):
                if file.relative_to(draft).as_posix() not in known:
                    file.unlink()
            _remove_empty(draft)
        journal.verified = {
            model: line
            for model, line in journal.verified.items()
            if verifications.get(model) == line.verification
            and all(job in journal.made and keys.get(job) == key for job, key in line.keys.items())
        }
        return journal

    def add(self, line: Line) -> None:
        """Append ``line`` and sync it: from now on it is done. Raises OutputError."""
        with writing(self.path), self.path.open("ab") as file:
            # what a crash left of a line ends here
            file.write(b"\n" + msgspec.json.encode(line) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if isinstance(line, Made):
            self.made[line.job] = line
        else:
            self.verified[line.model] = line


def _lines(path: Path) -> Iterator[Line]:
    if not path.exists():
        return
    with reading(path):
        content = path.read_bytes()
    for line in content.splitlines():
        try:
            yield msgspec.json.decode(line, type=Line)
        except msgspec.MsgspecError:
            continue  # torn by a crash, or empty


def _holds(draft: Path, files: Mapping[str, str], digests: FileDigests) -> bool:
    paths = {name: draft / name for name in files}
    if not all(path.is_file() for path in paths.values()):
        return False
    found = digests.of_all(paths.values())
    return all(found[path] == files[name] for name, path in paths.items())


def _remove_empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
