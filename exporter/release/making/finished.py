"""What a run before has finished at OUT, so that ``--resume`` has nothing left to do: a release, or a piece of one.

It counts only if it is what is asked for now: the same release.toml, the same inputs, options and tools.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from exporter.errors import OutputError, TTExportError
from exporter.io.files import read_file
from exporter.release.documents import manifest
from exporter.release.documents import run_record as record
from exporter.release.documents.manifest import ArtifactEntry
from exporter.release.facts import Artifact, Release
from exporter.release.making.finish import REPORT, job_facts, verify_facts
from exporter.release.making.piece import NAME as PIECE
from exporter.release.making.piece import Piece, read_piece

_MAX_REPORT_BYTES = 256 << 20


def finished_release(
    out: Path, facts: Release, keys: Mapping[str, str], verifications: Mapping[str, str]
) -> Release | None:
    """``facts`` with the artifacts of the release at ``out``; None if that is another one, or none.

    keys: job → what its artifact is made of, of all jobs in their order. verifications: model → digest of its
    verification's settings.
    """
    try:
        built, _ = manifest.read(out / manifest.NAME)
        run, _ = record.read(out / record.NAME)
        reports = _reports(out / REPORT)
    except (TTExportError, msgspec.MsgspecError):
        return None
    made = {job: told["key"] for job, told in run.jobs.items() if "key" in told}
    verified = {name: told["verification"] for name, told in run.jobs.items() if "verification" in told}
    wanted = {f"verify {model}": digest for model, digest in verifications.items()}
    entries = {one.job: one for one in built.artifacts}
    if (built.spec, made, verified) != (facts.spec, dict(keys), wanted) or entries.keys() != keys.keys():
        return None
    return replace(facts, artifacts=tuple(_artifact(entries[job], reports) for job in keys))


def finished_piece(
    out: Path, facts: Release, keys: Mapping[str, str], verifications: Mapping[str, str]
) -> Release | None:
    """As ``finished_release``, for the piece of the one job that ``keys`` is of."""
    try:
        piece = read_piece(out / PIECE)
    except TTExportError:
        return None
    made = {piece.made.job: piece.made.key}
    if (piece.release.spec, made, piece.verifications) != (facts.spec, dict(keys), dict(verifications)):
        return None
    return replace(facts, artifacts=(piece.artifact,))


def require_same(out: Path, found: Release | None) -> Release:
    """``found``, of a run that was interrupted while it cleaned up. Raises OutputError for another one."""
    if found is None:
        raise OutputError(out, "exists already, and is not what is asked for now; --force without --resume replaces it")
    return found


def told_jobs(out: Path) -> dict[str, dict[str, Any]]:
    """Job → how and how long it was made, and how long each model's verification took, of what is finished at ``out``.

    Raises UnreadableFile.
    """
    if (out / record.NAME).exists():
        return record.read(out / record.NAME)[0].jobs
    piece: Piece = read_piece(out / PIECE)
    seconds = {} if piece.verify_seconds is None else {piece.artifact.model: piece.verify_seconds}
    return {**job_facts({piece.made.job: piece.made}), **verify_facts(seconds, piece.verifications)}


def _reports(path: Path) -> dict[str, dict[str, Any]]:
    """Path of an artifact below the release → its report; empty where nothing was verified."""
    if not path.exists():
        return {}
    document: dict[str, Any] = msgspec.json.decode(read_file(path, max_nbytes=_MAX_REPORT_BYTES), type=dict[str, Any])
    return {one["artifact"]: one for one in document["artifacts"]}


def _artifact(entry: ArtifactEntry, reports: Mapping[str, dict[str, Any]]) -> Artifact:
    return Artifact(
        job=entry.job,
        model=entry.model,
        format=entry.format,
        storage=entry.storage,
        path=entry.path,
        parameters=entry.parameters,
        report=reports.get(entry.path),
    )
