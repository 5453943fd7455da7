"""Keep the journal of an unfinished release, with one line for each finished job and each verified model.

Each line of the journal is synced to disk. A line of the journal is valid only if the line is complete and all files
that the line lists exist with the recorded digests. Files in the staging folder that are not listed by any valid line
are removed.
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
    """A journal line for a finished job.

    key: digest of the job's inputs and options. files: maps the relative path of each file to its sha256. seconds: time
    for making the artifact, without hashing and verification. method: how the artifact was made, for example ``merged``
    or ``patched``.
    """

    job: str
    key: str
    files: dict[str, str]
    seconds: float
    method: str


class Verified(msgspec.Struct, frozen=True, kw_only=True, tag="verified"):
    """A journal line for one model whose artifacts have been verified.

    keys: maps each job to the digest of its inputs and options. reports: maps each job to its report, as in
    report.json. verification: digest of the verification settings.
    """

    model: str
    verification: str
    keys: dict[str, str]
    reports: dict[str, dict[str, Any]]
    seconds: float


Line = Made | Verified


@dataclass
class Journal:
    """The journal at ``path``: a map of each finished job to its line, and a map of each verified model to its line."""

    path: Path
    made: dict[str, Made] = field(default_factory=dict)
    verified: dict[str, Verified] = field(default_factory=dict)

    @classmethod
    def open(
        cls, path: Path, draft: Path, keys: Mapping[str, str], verifications: Mapping[str, str], digests: FileDigests
    ) -> Journal:
        """Read the journal, if the file exists, and drop the lines that are not valid for this run.

        draft: folder with the files that the lines list; all other files in the folder are removed. keys: maps each job
        to its current key. verifications: maps each model to the digest of its current verification settings. Raises
        UnreadableFile and OutputError.
        """
        journal = cls(path)
        for line in _lines(path):
            if isinstance(line, Made):
                if keys.get(line.job) == line.key and _intact(draft, line.files, digests):
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
        """Append ``line`` to the journal and sync the journal to disk. Raises OutputError."""
        with writing(self.path), self.path.open("ab") as file:
            # The first newline ends a line that may be incomplete after a crash.
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
            continue  # the line is empty, or incomplete after a crash


def _intact(draft: Path, files: Mapping[str, str], digests: FileDigests) -> bool:
    paths = {name: draft / name for name in files}
    if not all(path.is_file() for path in paths.values()):
        return False
    present = digests.of_all(paths.values())
    return all(present[path] == files[name] for name, path in paths.items())


def _remove_empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
