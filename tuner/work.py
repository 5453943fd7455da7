"""The folder beside an output in which an unfinished run keeps its checkpoints, and what it takes to continue one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from exporter.errors import OutputError, UnreadableFile, UsageError, writing

__all__ = ["last_checkpoint", "mark_complete", "start_or_resume", "work_folder"]

_RUN: Final = "run.json"
_COMPLETE: Final = "complete"


def work_folder(out: Path) -> Path:
    """Return the folder that a run with output ``out`` works in."""
    out = Path(os.path.abspath(out))
    return out.with_name(f".{out.name}.work")


def mark_complete(checkpoint: Path) -> None:
    """Say that everything in ``checkpoint`` is written; one without this mark is never continued from."""
    (checkpoint / _COMPLETE).touch()


def last_checkpoint(work: Path) -> Path | None:
    """Return the latest complete checkpoint, None if there is none."""
    found = [path.parent for path in work.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def start_or_resume(work: Path, run: Mapping[str, Any], *, resume: bool, force: bool) -> Path | None:
    """Prepare ``work`` for the run described by ``run`` (JSON values); return the checkpoint to continue from.

    resume: continue if there is something to continue, which must be the same run.  force: throw an earlier unfinished
    run away. Raises: UsageError when the runs differ, OutputError when an unfinished run would be lost.
    """
    checkpoint = last_checkpoint(work)
    if resume and checkpoint is not None:
        _check_same(work, json.loads(json.dumps(run)))
        return checkpoint
    if checkpoint is not None and not force:
        raise OutputError(work, "holds an unfinished run; continue it with --resume, or throw it away with --force")
    with writing(work):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
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
