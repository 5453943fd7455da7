"""``patch --report`` writes the same files as merge and verify."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.cli.main import run
from tests.support.documents import read_report


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def base(request: pytest.FixtureRequest, tiny_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / ("model.gguf" if request.param == "gguf" else "onnx-base")
    argv = ["export", str(tiny_tied), "--to", request.param, "--verify", "off", "-q", "-o", str(out)]
    assert run(argv) == 0
    return out


@pytest.mark.parametrize("proof", ["--base", "--trust-base"])
def test_a_report_of_a_patch_has_its_checks_and_digests(
    proof: str, base: Path, tiny_tied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    out, report = tmp_path / f"out{base.suffix}", tmp_path / "report"
    arguments = [proof, str(tiny_tied)] if proof == "--base" else [proof]
    assert run(["patch", str(base), str(tiny_adapter), "-q", "-o", str(out), "--report", str(report), *arguments]) == 0
    document = read_report(report)
    [artifact] = document["artifacts"]
    assert document["passed"]
    assert Path(artifact["artifact"]) == out
    assert artifact["checks"]
    assert document["files"]
    assert (document["reference"]["embedding_sha256"] is None) == (proof == "--trust-base")
    assert {path.name for path in report.iterdir()} == {"report.json", "report.xml", "report.html"}


def test_a_report_needs_something_to_report_and_a_place_apart(base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    argv = ["patch", str(base), str(tiny_adapter), "-q", "--trust-base", "-o", str(tmp_path / "out")]
    assert run([*argv, "--report", str(tmp_path / "report"), "--verify", "off"]) == 2
    assert run([*argv, "--report", str(tmp_path / "out" / "report")]) == 2
    assert list(tmp_path.iterdir()) == []
