"""Read and write run.json, which records the time, the machine and the durations of a run.

Two runs of the same release may differ only in run.json and in the signature. The file run.json contains the digests of
the manifest, of the signature and of the content of run.json. The digests in run.json reveal damage and careless edits.
If run.json is rewritten with new digests, the change is not detected, but the released files, whose digests are in the
manifest, are still protected.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

import msgspec

from exporter.io.files import read_file
from exporter.io.json_objects import MAX_CONFIG_BYTES
from exporter.release.documents import manifest as manifests
from exporter.release.documents.manifest import SCHEMA, Sha256, decode
from exporter.release.facts import Run

NAME: Final = "run.json"


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of run.json.

    sha256: digest of the canonical form of this record with ``sha256`` set to an empty text.
    """

    schema: int
    manifest_sha256: Sha256
    signature_sha256: Sha256 | None
    started: str
    finished: str
    invocation: str
    host: dict[str, str]
    jobs: dict[str, dict[str, Any]]
    sha256: str


def to_bytes(run: Run, manifest: bytes, signature: bytes | None) -> bytes:
    """Return the bytes of run.json: the facts about ``run``, and the digests of ``manifest`` and ``signature``."""
    record = Record(
        schema=SCHEMA,
        manifest_sha256=hashlib.sha256(manifest).hexdigest(),
        signature_sha256=hashlib.sha256(signature).hexdigest() if signature is not None else None,
        started=run.started,
        finished=run.finished,
        invocation=run.invocation,
        host=dict(run.host),
        jobs={job: dict(facts) for job, facts in run.jobs.items()},
        sha256="",
    )
    return manifests.to_bytes(msgspec.structs.replace(record, sha256=own_digest(record)))


def read(path: Path) -> tuple[Record, bytes]:
    """Read the run record at ``path`` and return the parsed record and the bytes of the file. Raises UnreadableFile."""
    content = read_file(path, max_nbytes=MAX_CONFIG_BYTES)
    return decode(path, content, Record), content


def own_digest(record: Record) -> str:
    """Return the sha256 of ``record`` with an empty ``sha256`` field."""
    return hashlib.sha256(manifests.to_bytes(msgspec.structs.replace(record, sha256=""))).hexdigest()
