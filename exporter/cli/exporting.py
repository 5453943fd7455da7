"""Define the options and the run function that the subcommands ``merge`` and ``export`` share."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import click

from exporter.cli.console import print_notes, print_reports, print_warnings, progress
from exporter.cli.options import (
    base_option,
    export_spec,
    force_option,
    format_groups,
    group_options,
    out_option,
    output_options,
    to_option,
)
from exporter.export.run import plan_export, run_export, written
from exporter.export.spec import MergeOptions
from exporter.formats.target import Target
from exporter.sizes import format_size
from exporter.sources.gguf.split_files import GgufModel
from exporter.verify.options import VerifyOptions
from exporter.verify.report import Report

_Command = TypeVar("_Command", bound=Callable[..., Any])


def export_options(command: _Command) -> _Command:
    """Add the command-line options that the subcommands ``merge`` and ``export`` have in common."""
    for add in (
        output_options,
        force_option,
        group_options(MergeOptions),
        group_options(VerifyOptions),
        group_options(*format_groups()),
        out_option,
        to_option,
        base_option,
    ):
        command = add(command)
    return command


def run(*, as_json: bool, quiet: bool, **options: Any) -> None:
    """Plan, write and verify the artifacts.

    After a successful run, the paths of the artifacts are printed to stdout, one per line, or as a JSON document.
    """
    started = time.perf_counter()
    del options["verbose"]
    plan = plan_export(export_spec(quiet=quiet, **options))
    print_notes(plan.merge.adapters, quiet=quiet)
    print_warnings(plan.merge.warnings)
    with progress(quiet=quiet) as hooks:
        reports = run_export(plan, hooks)
    paths = [report.artifact for report in reports] or [written(plan.place(target)) for target in plan.targets]
    if as_json:
        artifacts = [
            {
                "format": target.format,
                "storage": target.storage,
                "path": str(path),
                "nbytes": _nbytes(target, path),
                "notes": list(target.notes),
                "verification": report.to_json() if report else None,
            }
            for target, path, report in zip(plan.targets, paths, reports or repeat(None), strict=False)
        ]
        seconds = round(time.perf_counter() - started, 3)
        notes = [note for adapter in plan.merge.adapters for note in adapter.notes]
        document = {"artifacts": artifacts, "notes": notes, "out": str(plan.out), "seconds": seconds}
        click.echo(json.dumps(document, indent=2))
        return
    if not quiet:
        if any(report.level == "full" for report in reports):
            print_reports(reports)
        for number, target in enumerate(plan.targets):
            nbytes = format_size(_nbytes(target, paths[number]))
            print(f"{target.format} {target.storage}: {nbytes}, {_verdict(reports, number)}", file=sys.stderr)
            for note in target.notes:
                print(f"  note: {note}", file=sys.stderr)
    for path in paths:
        click.echo(path)


def _nbytes(target: Target, path: Path) -> int:
    """Return the size in bytes of a written file, or of all parts of a split GGUF file.

    For an artifact that is a folder, return the planned size of the weights.
    """
    if target.finish:
        return sum(file.path.stat().st_size for file in GgufModel.open(path).files)
    return path.stat().st_size if path.is_file() else target.nbytes


def _verdict(reports: list[Report], number: int) -> str:
    if not reports:
        return "not verified"
    report = reports[number]
    count = len(report.checks)
    if report.level == "rows":
        return f"token rows and weight tying verified on disk ({count} checks; --verify full also runs the model)"
    return f"equivalent ({count} checks)"
