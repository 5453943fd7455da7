"""report.xml and report.html, and errors if they cannot be made."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from junitparser import Error, Failure, JUnitXml, Skipped

from exporter.cli.main import run
from exporter.verify.reports.html import to_html
from exporter.verify.reports.junit import to_junit
from tests.support.documents import read_report, validate
from tests.verify.conftest import Tuned


def test_junit_has_one_case_per_check_and_a_failure_with_text_per_failed_check(report: Path) -> None:
    document = read_report(report)
    suites = list(JUnitXml.fromfile(str(report / "report.xml")))
    assert len(suites) == len(document["artifacts"])
    for suite, artifact in zip(suites, document["artifacts"], strict=True):
        cases = list(suite)
        checks = artifact["checks"] + artifact["skipped"]
        assert [case.name for case in cases] == [check["name"] for check in checks]
        failed = {case.name: case.result[0] for case in cases if not case.is_passed and not case.is_skipped}
        assert {name: failure.text for name, failure in failed.items()} == {
            check["name"]: check["detail"] for check in artifact["checks"] if not check["passed"]
        }
        assert all(isinstance(failure, Failure) for failure in failed.values())
        if failed:
            assert failed["mean KL"].message.startswith("mean KL: expected at most 1e-06, found ")
    assert sum(suite.failures for suite in suites) > 0


def sample(**check: Any) -> dict[str, Any]:
    """The smallest document, with one failed check."""
    failed = {"name": "runs", "passed": False, "value": None, "limit": None, "detail": ""} | check
    artifact = {
        "schema": 2,
        "artifact": "a&b.gguf",
        "format": "gguf",
        "level": "full",
        "passed": False,
        "checks": [failed],
        "facts": {"storage": "F32"},
        "skipped": [{"name": "llama.cpp", "reason": "not here"}],
        "rows": [],
        "profile": None,
    }
    setting = {
        "environment": {
            "ttexport": "0",
            "python": "3",
            "platform": "x",
            "cpu": "y",
            "cpus": 1,
            "threads": None,
            "packages": {"torch": None},
        },
        "reference": {"base": "base", "embedding_sha256": "0" * 64, "adapters": []},
        "files": [],
    }
    document = {"schema": 2, "passed": False, **setting, "artifacts": [artifact]}
    validate(document)
    return document


def test_control_characters_in_a_runtimes_message_break_neither_form() -> None:
    message = "\x1b[31m<boom> \x00 & \uffff ]]>"
    (suite,) = JUnitXml.fromstring(to_junit(sample(detail=message)))
    case, skipped = suite
    assert "<boom>" in case.result[0].text
    assert isinstance(skipped.result[0], Skipped)
    assert not isinstance(case.result[0], Error)
    assert b"&lt;boom&gt;" in to_html(sample(detail=message))


def test_a_check_with_the_value_nan_is_shown_in_every_form() -> None:
    document = sample(value="nan", limit=1.0)
    assert b"found nan" in to_junit(document)
    assert b">nan<" in to_html(document)


def test_the_page_loads_nothing(report: Path) -> None:
    page = (report / "report.html").read_text("utf-8")
    assert not re.findall(r"<(?:script|iframe|img|object|embed)\b|@import", page)
    references = re.findall(r"(?:href|src)=[\"']([^\"']*)", page) + re.findall(r"url\(([^)]*)\)", page)
    assert references
    assert all(reference.startswith("#") or reference == "data:," for reference in references)
    assert "<b>a story</b>" not in page, "a prompt is text, not markup"


def test_no_two_things_of_the_page_share_an_id(report: Path) -> None:
    ids = re.findall(r'\bid="([^"]*)"', (report / "report.html").read_text("utf-8"))
    assert len(ids) == len(set(ids))


def test_the_page_shows_the_verdict_first_and_every_check(report: Path) -> None:
    page = (report / "report.html").read_text("utf-8")
    body = page[page.index("<body>") :]
    assert body.index("Not equivalent") < body.index("<table>")
    checks = [check for artifact in read_report(report)["artifacts"] for check in artifact["checks"]]
    assert body.count('<td class="pass">pass') == sum(check["passed"] for check in checks)
    assert body.count('<td class="fail">FAIL') == sum(not check["passed"] for check in checks)


def test_a_report_of_level_rows_states_that_nothing_was_run(tuned: Tuned, tmp_path: Path) -> None:
    assert run([*tuned.argv(tuned.gguf), "--level", "rows", "--report", str(tmp_path)]) == 0
    assert read_report(tmp_path)["artifacts"][0]["profile"] is None
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "no model was run" in page
    assert page.count("<svg") == 1


@pytest.mark.parametrize("package", ["jinja2", "junitparser", "matplotlib"])
def test_a_missing_package_is_exit_6_before_anything_is_written(
    package: str, tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    merge = ["merge", str(tuned.adapter), "--base", str(tuned.base), "-q", "-o", str(tmp_path / "out")]
    for argv in (tuned.argv(tuned.gguf), merge):
        assert run([*argv, "--report", str(tmp_path / "report")]) == 6
        error = capsys.readouterr().err
        assert package in error.lower()
        assert "pip install 'ttexport[report]'" in error
    assert list(tmp_path.iterdir()) == []


def test_a_report_of_nothing_is_a_usage_error(tuned: Tuned, tmp_path: Path) -> None:
    argv = ["merge", str(tuned.adapter), "--base", str(tuned.base), "-q", "-o", str(tmp_path / "out")]
    assert run([*argv, "--verify", "off", "--report", str(tmp_path / "report")]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["out", "out/report"])
def test_a_report_inside_the_output_is_a_usage_error(place: str, tuned: Tuned, tmp_path: Path) -> None:
    argv = ["merge", str(tuned.adapter), "--base", str(tuned.base), "-q", "-o", str(tmp_path / "out")]
    assert run([*argv, "--report", str(tmp_path / place)]) == 2
    assert list(tmp_path.iterdir()) == []
