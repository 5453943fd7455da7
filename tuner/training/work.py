"""Manage the work folder, a hidden folder next to the output folder of a training run.

The work folder contains the checkpoints from which an unfinished run can be resumed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from exporter.errors import OutputError, UsageError, writing
from exporter.io.json_objects import read_object

__all__ = ["claimed", "is_first_process", "last_checkpoint", "mark_complete", "start_or_resume", "work_folder"]

_RUN: Final = "run.json"
_COMPLETE: Final = "complete"


def work_folder(out: Path) -> Path:
    """Return the path of the work folder that belongs to the output folder ``out``."""
    out = Path(os.path.abspath(out))
    return out.with_name(f".{out.name}.work")


def is_first_process() -> bool:
    """Whether this process is the only process of the run, or the first of the processes that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def claimed(work: Path) -> Iterator[None]:
    """Lock the folder ``work`` for this training run while the block runs.

    After the block, the folder ``work`` is removed, unless the folder contains a checkpoint to resume from. The lock is
    released when the process ends, even if the process is killed. Only the first process of a run acquires the lock.
    Raises: OutputError if another run has locked the work folder, or if the work folder cannot be created.
    """
    if not is_first_process():
        yield
        return
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
        handle = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise OutputError(
                work, "another run is using the work folder; use -o to choose another output folder"
            ) from exc
        try:
            yield
        finally:
            if last_checkpoint(work) is None:
                shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(handle)


def mark_complete(checkpoint: Path) -> None:
    """Mark ``checkpoint`` as completely written.

    A run never resumes from a checkpoint that is not marked as completely written.
    """
    (checkpoint / _COMPLETE).touch()


def last_checkpoint(work: Path) -> Path | None:
    """Return the latest complete checkpoint, or None if no checkpoint is complete."""
    complete = [path.parent for path in work.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def start_or_resume(work: Path, run: Mapping[str, Any], *, resume: bool, force: bool) -> Path | None:
    """Prepare the locked folder ``work`` for a new or resumed training run.

    Return the checkpoint to resume from, or None to train from the first step. run: the settings and digests that
    identify the run, as JSON values. resume: resume from the last checkpoint, if a checkpoint exists. force: discard an
    earlier unfinished run. Raises: UsageError if the run to resume differs from ``run``, OutputError if an unfinished
    run would be lost, UnreadableFile if run.json of the unfinished run is broken.
    """
    checkpoint = last_checkpoint(work)
    if resume and checkpoint is not None:
        _check_same(work, json.loads(json.dumps(run)))
        return checkpoint
    if checkpoint is not None and not force:
        raise OutputError(
            work,
            "the work folder contains an unfinished run; "
            "use --resume to continue or --force to discard the unfinished run",
        )
    with writing(work):
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (work / _RUN).write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return None


def _check_same(work: Path, run: Mapping[str, Any]) -> None:
    path = work / _RUN
    before = read_object(path)
    for name in sorted({*run, *before}):
        if run.get(name) != before.get(name):
            raise UsageError(
                f"--resume: {path}: {name}: expected {_shown(run.get(name))}, found {_shown(before.get(name))}; "
                "use --force without --resume to start from the beginning"
            )


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}…"
