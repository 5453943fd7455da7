"""Recognise a finished release or piece in the output folder, so that ``--resume`` does no work twice.

A release or piece counts as finished only if release.toml, the inputs, the options and the tools have not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from exporter.errors import OutputError, TTExportError
from exporter.io.files import read_file
from exporter.io.staging import has_leftover
from exporter.progress import Hooks
from exporter.release.documents import manifest, run_record
from exporter.release.documents.manifest import ArtifactEntry
from exporter.release.facts import Artifact, Release
from exporter.release.making.finish import REPORT, job_facts, verify_facts
from exporter.release.making.piece import NAME as PIECE
from exporter.release.making.piece import Piece, read_piece

_MAX_REPORT_BYTES = 256 << 20


def finished_release(
    out: Path, facts: Release, keys: Mapping[str, str], verifications: Mapping[str, str]
) -> Release | None:
    """Return a copy of ``facts`` that also lists the artifacts of the release at ``out``.

    Return None if ``out`` contains another release or no release. keys: maps each job, in order, to the digest of its
    inputs and options. verifications: maps each model to the digest of its verification settings.
    """
    try:
        released, _ = manifest.read(out / manifest.NAME)
        run, _ = run_record.read(out / run_record.NAME)
        reports = _reports(out / REPORT)
    except (TTExportError, msgspec.MsgspecError):
        return None
    made_keys = {job: entry["key"] for job, entry in run.jobs.items() if "key" in entry}
    verified = {name: entry["verification"] for name, entry in run.jobs.items() if "verification" in entry}
    expected = {f"verify {model}": digest for model, digest in verifications.items()}
    entries = {entry.job: entry for entry in released.artifacts}
    if (released.spec, made_keys, verified) != (facts.spec, dict(keys), expected) or entries.keys() != keys.keys():
        return None
    return replace(facts, artifacts=tuple(_artifact(entries[job], reports) for job in keys))


def finished_piece(
    out: Path, facts: Release, keys: Mapping[str, str], verifications: Mapping[str, str]
) -> Release | None:
    """Return a copy of ``facts`` that also lists the artifact of the finished piece at ``out``.

    Return None if ``out`` contains no piece, or a piece of another job, or a piece made with other options. keys: maps
    the job of the piece to the digest of its inputs and options.
    """
    try:
        piece = read_piece(out / PIECE)
    except TTExportError:
        return None
    made_keys = {piece.made.job: piece.made.key}
    if (piece.release.spec, made_keys, piece.verifications) != (facts.spec, dict(keys), dict(verifications)):
        return None
    return replace(facts, artifacts=(piece.artifact,))


def finished_before(out: Path, find: Callable[[], Release | None], hooks: Hooks) -> Release | None:
    """Return the finished release or piece that ``find`` finds at ``out``, or None if the work is not finished.

    If an interrupted run left a staging folder, the result is also None.
    """
    if has_leftover(out) or (release := find()) is None:
        return None
    hooks.say(f"{out}: already finished")
    return release


def require_same(out: Path, release: Release | None) -> Release:
    """Return ``release``, the finished release at ``out`` from a run that was interrupted after publishing it.

    Raises OutputError if ``release`` is None, which means that the folder ``out`` contains something else.
    """
    if release is None:
        raise OutputError(
            out, "the output exists already with other content; use --force without --resume to replace the output"
        )
    return release


def recorded_jobs(out: Path) -> dict[str, dict[str, Any]]:
    """Return the method and duration of each job, and the duration of each verification, as recorded in ``out``.

    The folder ``out`` must be a finished release or a finished piece. Raises UnreadableFile.
    """
    if (out / run_record.NAME).exists():
        return run_record.read(out / run_record.NAME)[0].jobs
    piece: Piece = read_piece(out / PIECE)
    seconds = {} if piece.verify_seconds is None else {piece.artifact.model: piece.verify_seconds}
    return {**job_facts({piece.made.job: piece.made}), **verify_facts(seconds, piece.verifications)}


def _reports(path: Path) -> dict[str, dict[str, Any]]:
    """Map the relative path of each artifact to the verification report of the artifact.

    The result is empty if no artifact was verified.
    """
    if not path.exists():
        return {}
    document: dict[str, Any] = msgspec.json.decode(read_file(path, max_nbytes=_MAX_REPORT_BYTES), type=dict[str, Any])
    return {report["artifact"]: report for report in document["artifacts"]}


def _artifact(entry: ArtifactEntry, reports: Mapping[str, dict[str, Any]]) -> Artifact:
    return Artifact(
        job=entry.job,
        model=entry.model,
        format=entry.format,
        storage=entry.storage,
        path=entry.path,
        parameters=entry.parameters,
        report=reports.get(entry.path),
        notes=tuple(entry.notes),
    )
