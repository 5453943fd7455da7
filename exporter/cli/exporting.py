"""What merge and export do once their options are parsed."""

from __future__ import annotations

import json
import sys
import time
from itertools import repeat
from pathlib import Path
from typing import Any

import click

from exporter.cli.options import export_spec
from exporter.cli.talk import print_reports, progress
from exporter.cli.text import size
from exporter.export.run import plan_export, run_export, written
from exporter.formats.target import Target
from exporter.sources.gguf.split_files import GgufModel
from exporter.verify.report import Report


def run(*, as_json: bool, quiet: bool, **options: Any) -> None:
    """Plan, write, verify; then say what lies where. Paths go to stdout, one a line, or the JSON document."""
    started = time.perf_counter()
    plan = plan_export(export_spec(quiet=quiet, **options))
    with progress(quiet=quiet) as hooks:
        reports = run_export(plan, hooks)
    planned = [plan.out / target.place if target.place else plan.out for target in plan.targets]
    paths = [report.artifact for report in reports] or [written(path) for path in planned]
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
        click.echo(json.dumps({"artifacts": artifacts, "out": str(plan.out), "seconds": seconds}, indent=2))
        return
    if not quiet:
        if any(report.level == "full" for report in reports):
            print_reports(reports)
        for number, target in enumerate(plan.targets):
            nbytes = size(_nbytes(target, paths[number]))
            print(f"{target.format} {target.storage}: {nbytes}, {_verdict(reports, number)}", file=sys.stderr)
            for note in target.notes:
                print(f"  note: {note}", file=sys.stderr)
    for path in paths:
        click.echo(path)


def _nbytes(target: Target, path: Path) -> int:
    """What a file has come to (before, an estimate); of a folder the weights."""
    if target.parts:
        return sum(file.path.stat().st_size for file in GgufModel.open(path).files)
    return path.stat().st_size if path.is_file() else target.nbytes


def _verdict(reports: list[Report], number: int) -> str:
    if not reports:
        return "not verified"
    report = reports[number]
    count = len(report.checks)
    if report.level == "rows":
        return f"verified on disk: rows and tie ({count} checks; --verify full also runs it)"
    return f"equivalent ({count} checks)"
