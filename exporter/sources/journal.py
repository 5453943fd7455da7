"""Finds the journal file that exists while an in-place patch modifies a model.

If a journal exists, an in-place patch was interrupted, and ttexport raises an error when the model is opened.
"""

from __future__ import annotations

from pathlib import Path

from exporter.errors import UnreadableFile


def journal_of(path: Path) -> Path:
    """Path of the journal of an in-place patch of the model ``path``, which is a file or a folder.

    The journal file is created at the start of the in-place patch and removed at the end.
    """
    named = path if path.name not in ("", "..") else path.resolve()
    return named.with_name(f"{named.name}.ttexport-journal")


def refuse_interrupted(path: Path) -> None:
    """Raise UnreadableFile if an in-place patch of the model at ``path`` was interrupted."""
    if journal_of(path).exists():
        raise UnreadableFile(
            path,
            "an in-place patch of this model was interrupted; "
            "run the patch again, which restores the old bytes before patching",
        )
