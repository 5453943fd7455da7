"""Joining pieces that were made elsewhere to the release that one machine would have made."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from exporter.errors import writing
from exporter.formats.output import OutputFile, Progress
from exporter.hooks import Hooks
from exporter.release.facts import Release
from exporter.release.finish import finish, now, run_of
from exporter.release.hashes import FileDigests
from exporter.release.piece import check_files, find_pieces, match_pieces
from exporter.release.spec import ReleaseSpec
from exporter.staging import require_space, resumable
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
    """Copy the pieces in ``folders`` to a release at ``out``; its facts. Neither base nor adapters are needed.

    Every file is compared with the digest that its job recorded. resume, force: what an interrupted run left is begun
    anew. Raises BadInput for pieces that are missing, damaged or do not belong together, OutputError.
    """
    hooks, started = hooks or Hooks(), now()
    pieces = find_pieces(folders)
    by_job = match_pieces(spec, pieces)
    digests = FileDigests()
    for folder, piece in pieces.items():
        check_files(folder, piece, digests)
    sizes = {folder: sum((folder / name).stat().st_size for name in pieces[folder].made.files) for folder in pieces}
    require_space(out, sum(sizes.values()))
    with resumable(out, force=force, resume=resume) as stage:
        if not stage.promoted:
            with writing(stage.draft):
                shutil.rmtree(stage.draft)
                stage.draft.mkdir()
            for job, folder in by_job.items():
                hooks.say(f"joining {job}")
                meter = hooks.start(job, sizes[folder])
                for name in pieces[folder].made.files:
                    _copy(folder / name, stage.draft / name, meter)
        found = [pieces[folder] for folder in by_job.values()]
        release = replace(found[0].release, artifacts=tuple(piece.artifact for piece in found))
        if not stage.promoted:
            seconds: dict[str, float] = {}
            for piece in found:
                if piece.verify_seconds is not None:
                    model = piece.artifact.model
                    seconds[model] = round(seconds.get(model, 0.0) + piece.verify_seconds, 4)
            run = run_of(started, {piece.made.job: piece.made for piece in found}, seconds)
            finish(stage.draft, release, run, spec.signing)
    return release


def _copy(source: Path, target: Path, meter: Progress) -> None:
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    size = source.stat().st_size
    with OutputFile(target, meter, nbytes=size) as file:
        file.copy(ByteRange(source, 0, size))
