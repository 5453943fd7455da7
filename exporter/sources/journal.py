"""Where the journal of a patch in place lies, and that nobody reads a model while there is one."""

from __future__ import annotations

from pathlib import Path

from exporter.errors import UnreadableFile


def journal_of(path: Path) -> Path:
    """The journal of a patch in place of the model at ``path``, a file or a folder, while it is under way."""
    whole = path if path.name not in ("", "..") else path.resolve()
    return whole.with_name(f"{whole.name}.ttexport-journal")


def refuse_interrupted(path: Path) -> None:
    """Raises UnreadableFile for a model in which a patch was interrupted."""
    if journal_of(path).exists():
        raise UnreadableFile(path, "a patch in place was interrupted here; run it again: it first undoes that")
