"""Replaces small files atomically.

If several processes write the same file at the same time, the file contains what the last process wrote.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from exporter.errors import writing
from exporter.io.files import write_synced


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` and create the folder of ``path`` if necessary.

    Other processes never see a partly written file. Raises OutputError if the write fails.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_synced(draft, content)
            draft.rename(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
