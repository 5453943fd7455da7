"""Show progress bars, messages and a table of checks on stderr.

Only data, such as paths and JSON documents, is printed to stdout.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from exporter.progress import Hooks, Progress
from exporter.sources.peft.adapter import Adapter
from exporter.verify.report import Check, Report


@contextmanager
def progress(*, quiet: bool) -> Iterator[Hooks]:
    """Return progress callbacks that draw bars if stderr is a terminal, and print lines if it is not.

    With ``quiet``, the progress callbacks do nothing.
    """
    if quiet:
        yield Hooks()
    elif sys.stderr.isatty():
        with _bars() as hooks:
            yield hooks
    else:
        yield Hooks(say=_print_line)


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _bars() -> Iterator[Hooks]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.SpinnerColumn(),
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(binary_units=True),
        rich_progress.TransferSpeedColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        def start(label: str, nbytes: int) -> Progress:
            task = bars.add_task(label, total=nbytes)
            return lambda done: bars.advance(task, done)

        status = bars.add_task("", total=None, visible=False)

        def say(line: str) -> None:
            bars.update(status, description=line, visible=True)

        yield Hooks(start=start, say=say)


def print_notes(adapters: Sequence[Adapter], *, quiet: bool) -> None:
    """Print the notes about each adapter to stderr, one note per line, unless ``quiet`` is set."""
    for note in [] if quiet else [note for adapter in adapters for note in adapter.notes]:
        print(f"note: {note}", file=sys.stderr)


def print_warnings(warnings: Iterable[str]) -> None:
    """Print each warning as one line to stderr, even with ``--quiet``."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def print_reports(reports: Sequence[Report]) -> None:
    """Print a table of all checks of the verification to stderr, with the details of each failed check."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("artifact", "check", "verdict", "value", "limit", "detail"):
        table.add_column(heading, justify="right" if heading in ("value", "limit") else "left", overflow="fold")
    for report in reports:
        for number, check in enumerate(report.checks):
            table.add_row(_short(report) if number == 0 else "", *_cells(check))
        for skip in report.skipped:
            table.add_row("", skip.name, "[yellow]not run[/]", "", "", escape(skip.reason))
    # Lines in a log file may be long. If the table were folded at 80 columns, the table would be unreadable.
    Console(stderr=True, width=None if sys.stderr.isatty() else 160).print(table)


def _cells(check: Check) -> tuple[str, ...]:
    from rich.markup import escape

    verdict = "[green]pass[/]" if check.passed else "[bold red]FAIL[/]"
    value = "" if check.value is None else f"{check.value:.3g}"
    limit = "" if check.limit is None else f"{check.limit:.3g}"
    return check.name, verdict, value, limit, escape(check.detail)


def _short(report: Report) -> str:
    from rich.markup import escape

    mark = "[green]✓[/]" if report.passed else "[bold red]✗[/]"
    return f"{mark} {escape(Path(report.artifact).name)}"
