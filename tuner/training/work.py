"""The folder beside an output in which an unfinished run keeps its checkpoints, and what it takes to continue one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from exporter.errors import OutputError, UnreadableFile, UsageError, writing

__all__ = ["claimed", "is_first_process", "last_checkpoint", "mark_complete", "start_or_resume", "work_folder"]

_RUN: Final = "run.json"
_COMPLETE: Final = "complete"


def work_folder(out: Path) -> Path:
    """Return the folder that a run with output ``out`` works in."""
    out = Path(os.path.abspath(out))
    return out.with_name(f".{out.name}.work")


def is_first_process() -> bool:
    """Whether this is the only process of the run, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def claimed(work: Path) -> Iterator[None]:
    """Keep ``work`` for this run; afterwards remove it, unless it holds a checkpoint to continue from.

    The claim ends with the process, however that ends. Processes but the first leave it to the first.
    Raises: OutputError when another run is using the folder, or it cannot be made.
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
            raise OutputError(work, "another run is working in it; choose another name") from exc
        try:
            yield
        finally:
            if last_checkpoint(work) is None:
                shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(handle)


def mark_complete(checkpoint: Path) -> None:
    """Say that everything in ``checkpoint`` is written; one without this mark is never continued from."""
    (checkpoint / _COMPLETE).touch()


def last_checkpoint(work: Path) -> Path | None:
    """Return the latest complete checkpoint, None if there is none."""
    found = [path.parent for path in work.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def start_or_resume(work: Path, run: Mapping[str, Any], *, resume: bool, force: bool) -> Path | None:
    """Prepare ``work`` (claimed) for the run that ``run`` describes; return the checkpoint to continue from.

    run: JSON values.  resume: continue if there is something to continue, which must be the same run.  force: throw an
    earlier unfinished run away.
    Raises: UsageError when the runs differ, OutputError when an unfinished run would be lost.
    """
    checkpoint = last_checkpoint(work)
    if resume and checkpoint is not None:
        _check_same(work, json.loads(json.dumps(run)))
        return checkpoint
    if checkpoint is not None and not force:
        raise OutputError(work, "holds an unfinished run; continue it with --resume, or throw it away with --force")
    with writing(work):
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (work / _RUN).write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return None


def _check_same(work: Path, run: Mapping[str, Any]) -> None:
    path = work / _RUN
    try:
        before = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise UnreadableFile(path, f"not readable as JSON: {exc}") from exc
    for name in sorted({*run, *before}):
        if run.get(name) != before.get(name):
            raise UsageError(
                f"--resume: {name.replace('_', ' ')} differs: the unfinished run has {_shown(before.get(name))}, "
                f"this one {_shown(run.get(name))}; start anew with --force"
            )


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}…"
