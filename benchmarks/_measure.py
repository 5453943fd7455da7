"""Measure several processes alternately, so that a varying load of the machine affects all of them equally.

Each variant runs in a separate worker process, so that peak memory is measured for each variant separately. In each
round, every worker runs one step. A ratio of times is computed from two times of the same round, and the median over
the rounds is reported.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._tree import TreePeak

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
RESULTS = Path(__file__).resolve().parent / "results"
#: The command line ``ttexport`` in the form of a command to start.
TTEXPORT = (sys.executable, "-c", "import sys; from exporter.cli import main; sys.exit(main())")


@dataclass
class Measured:
    """The measurements of one process. seconds, cpu_seconds: durations, with one value per round.

    peak_bytes: peak memory of the whole process or process tree.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Measured) -> None:
        """Add the measurements of a later process of the same variant.

        A fact that the later process reports replaces the fact of the same name that an earlier process reported.
        """
        self.seconds += other.seconds
        self.cpu_seconds += other.cpu_seconds
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        self.facts |= other.facts


class Worker:
    """A worker process that runs one benchmark step for each line on stdin.

    After each step, the worker prints the measurements as a line of JSON.
    """

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"benchmark: worker {self.name!r} exited with code {self.process.wait()}")
        result: dict[str, Any] = json.loads(line)
        return result

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        return self.answer()

    def end(self) -> int:
        """Close the worker process and return its peak memory in bytes."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        # wait4 reports the usage of this child alone. RUSAGE_CHILDREN would be the maximum over all children so far.
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.process.returncode:
            raise SystemExit(f"benchmark: worker {self.name!r} exited with code {self.process.returncode}")
        return usage.ru_maxrss * _RSS_UNIT


def take_turns(workers: Mapping[str, Sequence[str]], *, warm_up: int, rounds: int) -> dict[str, Measured]:
    """Run one step of each worker per round, and return the measurements.

    workers: maps the name of each worker to command-line arguments for the Python interpreter. The order of the workers
    rotates by one position in each round, so that the first worker is a different worker in each round.
    """
    running: dict[str, Worker] = {}
    measured = {name: Measured() for name in workers}
    try:
        for name, arguments in workers.items():
            running[name] = Worker(name, arguments)
            measured[name].facts = running[name].answer()
        names = list(workers)
        for turn in range(warm_up + rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                answer = running[name].step()
                if turn >= warm_up:
                    measured[name].seconds.append(answer["seconds"])
                    measured[name].cpu_seconds.append(answer["cpu_seconds"])
                measured[name].facts |= answer
        for name, worker in running.items():
            measured[name].peak_bytes = worker.end()
    finally:
        for worker in running.values():
            if worker.process.returncode is None:
                worker.process.kill()
                worker.process.wait()
    return measured


def serve(step: Callable[[], Mapping[str, Any]], **facts: Any) -> None:
    """Act as a worker process: print ``facts``, then run and time ``step`` once for each line on stdin."""
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        results = dict(step())
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"seconds": wall, "cpu_seconds": cpu, **results}), flush=True)


@dataclass(frozen=True)
class Program:
    """A command to measure, with the arguments that a user would type.

    out: the output of the command, which is removed after every run, or None. slow: whether to run the command only in
    the first measured round.
    """

    arguments: Sequence[str]
    out: Path | None = None
    slow: bool = False


def whole_programs(
    programs: Mapping[str, Program], *, warm_up: int, rounds: int, tree: bool = False
) -> dict[str, Measured]:
    """Run each program once per round from start to end, and return the measurements. programs: maps names to programs.

    tree: whether to measure the peak memory of all processes of a program together, or only the peak of the largest
    process. Before each run, the file systems are synced, so that no program has to wait until another program's data
    is written. The order of the programs is drawn at random in each round, because the cost of reusing freed memory
    depends on the program that freed the memory.
    """
    measured = {name: Measured() for name in programs}
    names = list(programs)
    for turn in range(warm_up + rounds):
        for name in random.Random(turn).sample(names, len(names)):
            if programs[name].slow and turn != warm_up:
                continue
            os.sync()
            seconds, cpu_seconds, peak_bytes = _run(name, programs[name], tree=tree)
            if turn >= warm_up:
                measured[name].add(Measured([seconds], [cpu_seconds], peak_bytes))
    return measured


def _environment() -> dict[str, str]:
    """Return the environment variables for the measured programs.

    ``PYTHONDONTWRITEBYTECODE`` is removed, so that Python caches bytecode as in a user's installation.
    """
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _run(name: str, program: Program, *, tree: bool) -> tuple[float, float, int]:
    """Run a program and return (seconds, CPU seconds, peak memory in bytes).

    The CPU seconds include the CPU time of child processes.
    """
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(program.arguments, stdout=output, stderr=output, env=_environment())
        with TreePeak(process.pid) if tree else nullcontext() as sampled:
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            text = output.read().decode(errors="replace")
            raise SystemExit(f"benchmark: {name!r} exited with code {process.returncode}: {text}")
    if program.out:
        shutil.rmtree(program.out) if program.out.is_dir() else program.out.unlink()
    peak_bytes = sampled.peak_bytes if sampled else usage.ru_maxrss * _RSS_UNIT
    return seconds, usage.ru_utime + usage.ru_stime, peak_bytes


def ratio(mine: Sequence[float], other: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio ``mine`` / ``other``.

    Rounds that only one of the two sequences contains are ignored.
    """
    return median(a / b for a, b in zip(mine, other, strict=False))


def machine() -> dict[str, Any]:
    """Return facts about the machine, including the load, that are needed to interpret the results."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "load_1_5_15_min": [round(value, 2) for value in os.getloadavg()],
    }


def verdict(name: str, value: float, bar: float, *, at_least: bool = False) -> tuple[bool, str]:
    """Return whether ``value`` meets the limit ``bar``, and a line of text with ``value`` and ``bar``.

    at_least: whether ``bar`` is a minimum; otherwise, ``bar`` is a maximum.
    """
    met = value >= bar if at_least else value <= bar
    return met, f"{name} {value:.4g}, bar {bar:g}: {'met' if met else 'MISSED'}"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, notes: Sequence[str] = ()) -> None:
    """Print a table whose first column contains text and whose other columns contain numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for note in notes:
        console.print(note)


def write(name: str, document: Mapping[str, Any]) -> Path:
    """Write ``document`` to benchmarks/results/``name``.json and return the path of the file."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return path
