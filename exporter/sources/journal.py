"""Path of the journal of an in-place patch; a model with a journal is not read."""

from __future__ import annotations

from pathlib import Path

from exporter.errors import UnreadableFile


def journal_of(path: Path) -> Path:
    """The journal of an in-place patch of the model at ``path``, a file or a folder; it exists during the patch."""
    named = path if path.name not in ("", "..") else path.resolve()
    return named.with_name(f"{named.name}.ttexport-journal")


def refuse_interrupted(path: Path) -> None:
    """Raises UnreadableFile for a model with an interrupted in-place patch."""
    if journal_of(path).exists():
        raise UnreadableFile(path, "a patch in place was interrupted here; run it again: it first undoes that")
