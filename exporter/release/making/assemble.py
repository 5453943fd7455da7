"""Join pieces that were made on other machines into the release that a single machine would have made."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from exporter.errors import writing
from exporter.io.digests import FileDigests
from exporter.io.output import OutputFile
from exporter.io.staging import Stage, require_space, resumable
from exporter.progress import Hooks, Progress
from exporter.release.facts import Release
from exporter.release.making.finish import finish, now, require_finish, run_facts
from exporter.release.making.finished import finished_before, finished_release, require_same
from exporter.release.making.piece import Piece, check_files, find_pieces, match_pieces
from exporter.release.spec import ReleaseSpec
from exporter.tensors import ByteRange


def assemble_release(
    spec: ReleaseSpec,
    folders: Sequence[Path],
    out: Path,
    hooks: Hooks | None = None,
    *,
    resume: bool = False,
    force: bool = False,
) -> Release:
    """Copy the pieces in ``folders`` into a release at ``out`` and return the facts of the release.

    The files of the base and of the adapters are not needed for joining. resume: if the release is already finished,
    return the release unchanged. With ``resume`` or ``force``, an unfinished release at ``out`` is discarded and made
    again from the beginning. Raises OutputError and every error that ``CollectedPieces.open`` raises.
    """
    hooks, started = hooks or Hooks(), now()
    collected = CollectedPieces.open(spec, folders)
    find = partial(finished_release, out, collected.release, collected.keys, collected.verifications)
    if resume and (finished := finished_before(out, find, hooks)):
        return finished
    require_finish(spec.signing)
    require_space(out, collected.nbytes)
    with resumable(out, force=force, resume=resume) as stage:
        if stage.promoted:
            return require_same(out, find())
        return collected.join(stage, hooks, started)


@dataclass(frozen=True)
class CollectedPieces:
    """The pieces of a release: one folder for each job, in the order of the jobs.

    pieces: maps each folder to the content of its ``piece.json``. sizes: maps each folder to the size of its artifact
    in bytes.
    """

    spec: ReleaseSpec
    pieces: Mapping[Path, Piece]
    sizes: Mapping[Path, int]

    @classmethod
    def open(cls, spec: ReleaseSpec, folders: Sequence[Path]) -> CollectedPieces:
        """Find the pieces in ``folders`` and compare the digest of every file with the digest that the piece records.

        Raises BadInput if a piece is missing or damaged, or if the pieces come from different releases.
        """
        available = find_pieces(folders)
        pieces = {folder: available[folder] for folder in match_pieces(spec, available).values()}
        digests = FileDigests()
        for folder, piece in pieces.items():
            check_files(folder, piece, digests)
        sizes = {
            folder: sum((folder / name).stat().st_size for name in piece.made.files) for folder, piece in pieces.items()
        }
        return cls(spec, pieces, sizes)

    @property
    def nbytes(self) -> int:
        """Total size of the files of all pieces in bytes."""
        return sum(self.sizes.values())

    @property
    def release(self) -> Release:
        """The facts of the release, with the artifacts of all pieces."""
        pieces = list(self.pieces.values())
        return replace(pieces[0].release, artifacts=tuple(piece.artifact for piece in pieces))

    @property
    def keys(self) -> dict[str, str]:
        """For each job, the digest of its inputs and options."""
        return {piece.made.job: piece.made.key for piece in self.pieces.values()}

    @property
    def verifications(self) -> dict[str, str]:
        """For each model, the digest of its verification settings."""
        return {model: digest for piece in self.pieces.values() for model, digest in piece.verifications.items()}

    def join(self, stage: Stage, hooks: Hooks, started: str) -> Release:
        """Copy the artifacts of all pieces into the staging folder ``stage``, and write the documents of the release.

        started: time at which the run started, in RFC 3339 format.
        """
        with writing(stage.draft):
            shutil.rmtree(stage.draft)
            stage.draft.mkdir()
        seconds: dict[str, float] = {}
        for folder, piece in self.pieces.items():
            hooks.say(f"joining {piece.made.job}")
            meter = hooks.start(piece.made.job, self.sizes[folder])
            for name in piece.made.files:
                _copy(folder / name, stage.draft / name, meter)
            if piece.verify_seconds is not None:
                model = piece.artifact.model
                seconds[model] = round(seconds.get(model, 0.0) + piece.verify_seconds, 4)
        made = {piece.made.job: piece.made for piece in self.pieces.values()}
        facts = run_facts(started, made, seconds, self.verifications)
        finish(stage.draft, self.release, facts, self.spec.signing)
        return self.release


def _copy(source: Path, target: Path, meter: Progress) -> None:
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    size = source.stat().st_size
    with OutputFile(target, meter, nbytes=size) as file:
        file.copy(ByteRange(source, 0, size))
