"""Coverage of each room, printed after a run with ``--cov``; a room below its floor fails the run.

Only this process and the workers are measured. Code that runs in separate processes (runtimes, tracing, training under
torchrun) counts as not covered; the floors take this into account.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parents[2]
#: Room → share of its lines that the whole suite runs, a little below what was measured.
FLOORS: Final[Mapping[str, float]] = {
    "exporter": 0.95,
    "exporter/cli": 0.91,
    "exporter/export": 0.97,
    "exporter/families": 0.98,
    "exporter/formats": 0.87,
    "exporter/io": 0.95,
    "exporter/merge": 0.95,
    "exporter/models": 0.89,
    "exporter/patch": 0.93,
    "exporter/peft_modules": 0.95,
    "exporter/release": 0.92,
    "exporter/sources": 0.94,
    "exporter/verify": 0.86,
    "ttexport": 0.85,
    "tuner": 0.91,
    "tuner/inputs": 0.96,
    "tuner/layers": 0.95,
    "tuner/training": 0.94,
}
_FIGURES = pytest.StashKey[dict[str, float]]()


def room_of(path: Path) -> str:
    """``exporter/verify/gguf/layout.py`` is in exporter/verify; files directly in a package are in the package."""
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[:2] if len(parts) > 2 else parts[:1])


def figures(lines: Mapping[Path, tuple[int, int]]) -> dict[str, float]:
    """Room → share of lines that ran. lines: file → (statements, statements that did not run)."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path, (statements, missing) in lines.items():
        totals[room_of(path)][0] += statements
        totals[room_of(path)][1] += missing
    return {room: 1 - missing / statements for room, (statements, missing) in sorted(totals.items()) if statements}


def too_low(shares: Mapping[str, float], floors: Mapping[str, float] = FLOORS) -> list[str]:
    """Rooms below their floor."""
    return [room for room, floor in floors.items() if shares.get(room, 0.0) < floor]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Compare the rooms with their floors, where a whole run was measured."""
    plugin: Any = session.config.pluginmanager.getplugin("_cov")
    if hasattr(session.config, "workerinput") or plugin is None or plugin.cov_controller is None:
        return
    measured = plugin.cov_controller.cov
    files = [Path(name) for name in measured.get_data().measured_files()]
    analysed = {path: measured.analysis2(str(path)) for path in files if path.is_relative_to(ROOT)}
    shares = figures({path: (len(found[1]), len(found[3])) for path, found in analysed.items()})
    session.config.stash[_FIGURES] = shares
    if too_low(shares):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """Print all rooms before the other summaries, and the rooms below their floors after the other summaries.

    The last lines of a log then explain why a run without a failed test has the exit code 1.
    """
    shares = terminalreporter.config.stash.get(_FIGURES, {})
    if not shares:
        return (yield)
    terminalreporter.section("coverage of rooms")
    for room, share in shares.items():
        floor = FLOORS.get(room)
        verdict = "" if floor is None else f", floor {floor:.0%}" + (": TOO LOW" if share < floor else "")
        terminalreporter.write_line(f"{room}: {share:.1%}{verdict}")
    yield
    for room in too_low(shares):
        share, floor = shares.get(room, 0.0), FLOORS[room]
        terminalreporter.write_line(f"TOO LOW: the coverage of {room} is {share:.1%}, below the floor of {floor:.0%}")
