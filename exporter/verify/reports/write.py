"""Writes the three forms of a report; all are made before any is written, and all from one document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from exporter.errors import writing
from exporter.io.staging import write_file
from exporter.packages import REPORT
from exporter.verify.report import Report, document, to_bytes

JSON: Final = "report.json"
XML: Final = "report.xml"
HTML: Final = "report.html"


def require_renderers() -> None:
    """Raise MissingDependency before any work is done; nothing is imported."""
    for package in REPORT:
        package.require("--report")


def write_report(folder: Path, reports: Sequence[Report], setting: dict[str, Any]) -> None:
    """Put report.json, report.xml and report.html into ``folder``, in place of older ones. Raises OutputError."""
    from exporter.verify.reports.html import to_html
    from exporter.verify.reports.junit import to_junit

    found = document(reports, setting)
    forms = {JSON: to_bytes(found), XML: to_junit(found), HTML: to_html(found)}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in forms:
            (folder / name).unlink(missing_ok=True)
    for name, content in forms.items():
        write_file(folder / name, content)
