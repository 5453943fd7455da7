"""Small files that are replaced whole, by whoever comes last."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from exporter.errors import writing


def write_atomically(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path``, and its folder there before; readers see the old file or the new one.

    Raises OutputError.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.rename(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
