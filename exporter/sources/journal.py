"""Finds the journal of an in-place patch. A model with a journal is not read, because the patch was interrupted."""

from __future__ import annotations

from pathlib import Path

from exporter.errors import UnreadableFile


def journal_of(path: Path) -> Path:
    """Path of the journal of an in-place patch of the model at ``path``, a file or a folder.

    The journal exists only during the patch.
    """
    named = path if path.name not in ("", "..") else path.resolve()
    return named.with_name(f"{named.name}.ttexport-journal")


def refuse_interrupted(path: Path) -> None:
    """Raises UnreadableFile if an in-place patch of the model at ``path`` was interrupted."""
    if journal_of(path).exists():
        raise UnreadableFile(
            path,
            "an in-place patch of this model was interrupted; run the patch again, which first restores the old bytes",
        )
