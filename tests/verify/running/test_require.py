"""A missing runtime is reported, and is an error if it was required."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from exporter.cli.main import run
from fixtures.models.families import build
from tests.support.documents import read_report
from tests.verify.conftest import Tuned

#: name → (module that is hidden, the pip command in the message)
RUNTIMES = {
    "llama.cpp": ("llama_cpp", "pip install 'ttexport[llamacpp]'"),
    "onnxruntime": ("onnxruntime", "pip install 'onnxruntime'"),
    "transformers": ("peft", "pip install 'ttexport'"),
    "transformers-gguf": ("gguf", "pip install 'ttexport'"),
}


def without(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the package from the import system of this process."""
    monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_required_runtime_that_is_missing_is_exit_6_before_anything_is_written(
    name: str, tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, install = RUNTIMES[name]
    without(module, monkeypatch)
    merge = ["merge", str(tuned.adapter), "--base", str(tuned.base), "-q", "-o", str(tmp_path / "out")]
    for argv in ([*tuned.argv(tuned.gguf), "--level", "rows"], merge):
        assert run([*argv, "--require", name]) == 6
        error = capsys.readouterr().err
        assert install in error
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_required_runtimes_that_are_installed_change_nothing(tuned: Tuned) -> None:
    arguments = ["--require", "transformers", "--require", "onnxruntime", "--level", "rows"]
    assert run([*tuned.argv(tuned.gguf), *arguments]) == 0


def test_an_unknown_runtime_is_a_usage_error(tuned: Tuned) -> None:
    assert run([*tuned.argv(tuned.gguf), "--require", "vllm"]) == 2


def test_without_its_only_runtime_an_artifact_is_not_proven_and_not_refuted(
    tuned: Tuned, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without("onnxruntime", monkeypatch)
    assert run(tuned.argv(tuned.onnx)) == 6
    assert "pip install 'onnxruntime'" in capsys.readouterr().err


def test_without_llama_cpp_the_report_lists_what_was_not_run(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without("llama_cpp", monkeypatch)
    argv = [argument for argument in tuned.argv(tuned.gguf_f32) if argument != "-q"]
    assert run([*argv, "--report", str(tmp_path)]) == 0
    (artifact,) = read_report(tmp_path)["artifacts"]
    assert artifact["facts"]["runtime"] == "transformers"
    output = " ".join(capsys.readouterr().err.split())
    assert f"running {tuned.gguf_f32.name} in transformers" in output
    skipped = next(entry for entry in artifact["skipped"] if entry["name"] == "llama.cpp")
    assert any("llama-cpp-python not installed" in entry["reason"] for entry in artifact["skipped"])
    for text in (
        skipped["reason"],
        output,
        (tmp_path / "report.xml").read_text(),
        (tmp_path / "report.html").read_text(),
    ):
        assert "ttexport[llamacpp]" in text


def test_transformers_does_not_run_what_its_loader_computes_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = build("gemma2", tmp_path / "base")
    out = tmp_path / "model.gguf"
    arguments = ["--pre-tokenizer", "smollm", "--verify", "off", "-q", "-o", str(out)]
    assert run(["export", str(base), "--to", "gguf", *arguments]) == 0
    without("llama_cpp", monkeypatch)
    assert run(["verify", str(out), "--reference", str(base), "-q"]) == 6
    output = capsys.readouterr().err
    assert "the GGUF loader of transformers does not support gemma2" in output
    assert "pip install 'ttexport[llamacpp]'" in output
