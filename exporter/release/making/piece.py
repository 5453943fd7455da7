"""Write pieces, find pieces in folders, and assign each piece to its job.

A piece is a folder with the artifact of one job and a file that describes the artifact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec

from exporter.errors import BadInput, UnreadableFile
from exporter.io.digests import FileDigests, files_below
from exporter.io.files import read_file
from exporter.io.staging import write_file
from exporter.release.facts import Artifact, Release
from exporter.release.jobs import Job, jobs_of
from exporter.release.making.journal import Made, Verified
from exporter.release.plan import recorded_spec
from exporter.release.spec import ReleaseSpec

NAME: Final = "piece.json"
_SCHEMA: Final = 2
_MAX_BYTES: Final = 256 << 20


class Piece(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Content of ``piece.json``. release: the facts of the release without its artifacts, equal in all of its pieces.

    verification: digest of the verification settings. verify_seconds: duration of the verification in seconds. If the
    artifact was not verified, ``verification`` and ``verify_seconds`` are None.
    """

    schema: int
    release: Release
    artifact: Artifact
    made: Made
    verification: str | None
    verify_seconds: float | None

    @property
    def verifications(self) -> dict[str, str]:
        """Map of each model to the digest of its verification settings; empty if the artifact was not verified."""
        return {} if self.verification is None else {self.artifact.model: self.verification}


def write_piece(folder: Path, release: Release, made: Made, verified: Verified | None) -> None:
    """Write ``piece.json``, which describes the only artifact of ``release``, into ``folder``. Raises OutputError."""
    (artifact,) = release.artifacts
    piece = Piece(
        schema=_SCHEMA,
        release=replace(release, artifacts=()),
        artifact=artifact,
        made=made,
        verification=verified.verification if verified else None,
        verify_seconds=verified.seconds if verified else None,
    )
    write_file(folder / NAME, msgspec.json.format(msgspec.json.encode(piece), indent=2) + b"\n")


def find_pieces(folders: Sequence[Path]) -> dict[Path, Piece]:
    """Map the folder of each piece to the content of the piece's ``piece.json``.

    The folders in ``folders`` and their direct subfolders are searched. Raises UnreadableFile if a folder in
    ``folders`` contains no piece.
    """
    pieces: dict[Path, Piece] = {}
    for folder in folders:
        places = [folder] if (folder / NAME).exists() else sorted(path.parent for path in folder.glob(f"*/{NAME}"))
        if not places:
            raise UnreadableFile(
                folder, f"expected a piece made with --only, or a folder of pieces, but {NAME} was not found"
            )
        pieces |= {place: read_piece(place / NAME) for place in places}
    return pieces


def match_pieces(spec: ReleaseSpec, pieces: Mapping[Path, Piece]) -> dict[str, Path]:
    """Map every job of the release to the folder of the job's piece.

    Raises BadInput if there is no piece or more than one piece for a job, or if the pieces were made from different
    inputs, with different prompts or with different tools.
    """
    jobs = {job.name: job for job in jobs_of(spec)}
    by_job: dict[str, Path] = {}
    first, shared = next(iter(pieces.items()))
    made_from = shared.release.spec
    adapters = {name: model.adapters for name, model in shared.release.models.items() if name in spec.models}
    if fault := _difference(recorded_spec(spec, str(made_from["base"]), adapters), made_from, "release"):
        raise BadInput(f"{first / NAME}: the piece was made from a different release.toml: {fault}")
    for folder, piece in pieces.items():
        name = piece.made.job
        if name not in jobs or not _is_of(jobs[name], piece):
            raise BadInput(
                f"{folder / NAME}: release.toml has no job {name!r:.80}, or has different options for this job"
            )
        if name in by_job:
            raise BadInput(
                f"{folder / NAME}: expected one piece per job, but the job {name} also has the piece {by_job[name]}"
            )
        if fault := _difference(msgspec.to_builtins(shared.release), msgspec.to_builtins(piece.release)):
            raise BadInput(f"{folder / NAME}: {fault} (expected the same value as in {first / NAME})")
        if piece.verification != shared.verification:  # the levels are equal at this point, so the prompts differ
            raise BadInput(
                f"{folder / NAME}: release.verify.prompts: expected the prompts of {first / NAME} ({_short(shared)}), "
                f"found other prompts ({_short(piece)})"
            )
        by_job[name] = folder
    if missing := [name for name in jobs if name not in by_job]:
        raise BadInput(f"--assemble: expected a piece for every job, found no piece for {', '.join(missing)}")
    return {name: by_job[name] for name in jobs}


def check_files(folder: Path, piece: Piece, digests: FileDigests) -> None:
    """Raise BadInput if the piece lacks a file that ``piece.json`` lists, or contains an unlisted or a changed file."""
    present = {path.relative_to(folder).as_posix(): path for path in files_below(folder) if path.name != NAME}
    for name in sorted(present.keys() ^ piece.made.files.keys()):
        fault = (
            f"{NAME} lists this file, but the file does not exist"
            if name in piece.made.files
            else f"{NAME} does not list this file"
        )
        raise BadInput(f"{folder / name}: {fault}")
    for name, path in present.items():
        if (digest := digests.of(path)) != piece.made.files[name]:
            raise BadInput(f"{path}: expected sha256 {piece.made.files[name][:12]}…, found {digest[:12]}…")


def read_piece(path: Path) -> Piece:
    """Read the ``piece.json`` at ``path``. Raises UnreadableFile."""
    try:
        piece = msgspec.json.decode(read_file(path, max_nbytes=_MAX_BYTES), type=Piece)
    except msgspec.MsgspecError as exc:
        raise UnreadableFile(path, f"expected a JSON description of a piece: {exc}") from exc
    if piece.schema != _SCHEMA:
        raise UnreadableFile(path, f"expected schema {_SCHEMA}, found {piece.schema}")
    return piece


def _short(piece: Piece) -> str:
    return f"digest {piece.verification[:12]}…" if piece.verification else "not verified"


def _is_of(job: Job, piece: Piece) -> bool:
    artifact, parameters = piece.artifact, msgspec.to_builtins(dict(job.parameters))
    return (artifact.format, artifact.model, dict(artifact.parameters)) == (job.format, job.model, parameters)


def _difference(expected: Any, actual: Any, where: str = "release") -> str | None:
    """Return a text that describes the first difference between two JSON documents, or None if the documents are equal.

    where: key path of the compared values.
    """
    if isinstance(expected, dict) and isinstance(actual, dict):
        for key in sorted(expected.keys() | actual.keys()):
            if fault := _difference(expected.get(key), actual.get(key), f"{where}.{key}"):
                return fault
        return None
    return None if expected == actual else f"{where}: expected {expected!r:.80}, found {actual!r:.80}"
