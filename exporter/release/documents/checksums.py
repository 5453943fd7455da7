"""Render SHA256SUMS, which contains one line per file in the format that ``sha256sum -c`` reads."""

from __future__ import annotations

import hashlib
from typing import Final

from exporter.release.documents.manifest import Manifest

NAME: Final = "SHA256SUMS"


def to_bytes(manifest: Manifest, documents: dict[str, bytes]) -> bytes:
    """Return one line per file of the manifest and of ``documents`` (maps name to content), sorted by path."""
    digests = {entry.path: entry.sha256 for entry in manifest.files}
    digests |= {name: hashlib.sha256(content).hexdigest() for name, content in documents.items()}
    # Two spaces mean text mode. GNU coreutils treats text mode like binary mode on all current systems.
    return "".join(f"{digest}  {path}\n" for path, digest in sorted(digests.items())).encode()
