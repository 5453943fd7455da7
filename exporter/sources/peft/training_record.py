"""Reads from an adapter folder the record of the base model on which ``ttexport tune`` trained the adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.errors import UnreadableFile
from exporter.io.json_objects import read_object

RECORD: Final = "train.json"
#: Limit for a record. A file of this name that is larger is the data of another tool.
MAX_RECORD_BYTES: Final = 4 << 20
_DIGEST: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """The base model on which an adapter was trained, as recorded by ``ttexport tune``.

    path: the file that contains the record. base: path or hub id of the base, without a revision. tensor: name of the
    stored input embedding. digest: SHA-256 digest of the stored bytes of the input embedding.
    """

    path: Path
    base: str
    tensor: str
    digest: str


def read_record(folder: Path) -> TrainingRecord | None:
    """Return the training record in the adapter folder, or None if the folder has no record of ``ttexport tune``.

    A file named train.json may also be a data set or the record of another tool.
    """
    path = folder / RECORD
    try:
        if not path.is_file() or path.stat().st_size > MAX_RECORD_BYTES:
            return None
        record = read_object(path, max_nbytes=MAX_RECORD_BYTES)
    except (OSError, UnreadableFile):
        return None
    base, digest, described = record.get("base"), record.get("base_digest"), record.get("base_tensor")
    tensor = described.get("name") if isinstance(described, dict) else None
    if not (isinstance(base, str) and isinstance(tensor, str) and isinstance(digest, str)):
        return None
    return TrainingRecord(path, base, tensor, digest) if _DIGEST.fullmatch(digest) else None
