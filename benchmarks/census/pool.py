"""Test each model of the census in a separate process, forked from a process that has already imported all packages."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.census.converter import preload
from benchmarks.census.trial import ADAPTERS, CRASH, rows_of, run_trial
from exporter.formats.gguf.converter.install import installed_converter
from fixtures.zoo.names import NAMES
from fixtures.zoo.recipes import Recipe


def run_all(
    names: Sequence[str],
    targets: Sequence[str],
    *,
    jobs: int,
    limit: int,
    recipes: Mapping[str, Recipe] = ADAPTERS,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the results of each model of the census as soon as its process ends.

    names: names of models of the zoo. recipes: maps names of adapters to recipes. jobs: maximum number of simultaneous
    processes. limit: seconds after which a process ends itself; results that are missing when a process ends are
    recorded as crashes.
    """
    work = Path(tempfile.mkdtemp(prefix="census-"))
    if "gguf" in targets and (script := installed_converter()):
        preload(script)
    waiting, running = list(names), dict[int, tuple[str, float]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                running[_start(name, work, targets, limit, recipes)] = name, time.monotonic()
            child, status = os.wait()
            name, started = running.pop(child)
            code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - started
            yield _finished(name, work, [(adapter, target) for adapter in recipes for target in targets], code, seconds)
    finally:
        for child in running:
            os.kill(child, signal.SIGKILL)
        shutil.rmtree(work, ignore_errors=True)


def _start(name: str, work: Path, targets: Sequence[str], limit: int, recipes: Mapping[str, Recipe]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(limit)
        silent = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(silent, descriptor)
        run_trial(name, work / name, targets, work / f"{name}.jsonl", recipes)
        code = 0
    finally:
        os._exit(code)


def _finished(
    name: str, work: Path, merges: Sequence[tuple[str, str]], code: int, seconds: float
) -> list[dict[str, Any]]:
    rows = rows_of(work / f"{name}.jsonl")
    shutil.rmtree(work / name, ignore_errors=True)
    if code:
        cause = "exceeded the time limit" if code == -signal.SIGALRM else f"ended with exit code {code}"
        if not rows:
            place = {"name": name, "class_name": NAMES[name], "result": CRASH}
            rows = [{**place, "adapter": adapter, "target": target} for adapter, target in merges]
        for row in rows:
            if row["result"] == CRASH and not row.get("reason"):
                row["reason"], row["seconds"] = f"the process {cause}", round(seconds, 1)
    return rows
