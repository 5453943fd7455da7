"""Write a report as JSON, JUnit XML and HTML.

report.json, report.xml and report.html are rendered from the same data, and are written only after all three are
rendered.
"""

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
    """Raise MissingDependency if a package that is needed to render reports is not installed."""
    for package in REPORT:
        package.require("--report")


def write_report(folder: Path, reports: Sequence[Report], setting: dict[str, Any]) -> None:
    """Write report.json, report.xml and report.html to ``folder``, replacing existing reports.

    Raises OutputError if a report file cannot be written.
    """
    from exporter.verify.reports.html import to_html
    from exporter.verify.reports.junit import to_junit

    content = document(reports, setting)
    forms = {JSON: to_bytes(content), XML: to_junit(content), HTML: to_html(content)}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in forms:
            (folder / name).unlink(missing_ok=True)
    for name, data in forms.items():
        write_file(folder / name, data)
