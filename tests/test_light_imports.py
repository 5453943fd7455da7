"""Packages that a command must not import: verbs that run no model must not load packages that run models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.formats.gguf import plan_gguf, write_gguf
from exporter.formats.onnx import choose, plan_onnx, write_onnx
from exporter.merge.plan import plan_merge
from exporter.sources.hf.checkpoint import Checkpoint

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "peft", "onnxruntime", "onnx", "onnx_ir", "llama_cpp")
REPORTING = ("jinja2", "junitparser", "matplotlib")
PROBE = f"""
import json, sys
from exporter.cli.main import run
code = run(sys.argv[1:])
print(json.dumps([code, [name for name in {(*HEAVY, *REPORTING)!r} if name in sys.modules]]), file=sys.stderr)
"""


def run_and_list(*arguments: object) -> tuple[int, list[str]]:
    """The exit code of a command, and the heavy packages that its process imported."""
    command = [sys.executable, "-c", PROBE, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    code, loaded = json.loads(done.stderr.splitlines()[-1])
    return code, loaded


def test_help_and_version_import_nothing_heavy() -> None:
    assert run_and_list("--help") == (0, [])
    assert run_and_list("merge", "--help") == (0, [])


@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_a_merge_imports_nothing_heavy(target: str, tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_and_list("merge", tiny_adapter, "--base", tiny_tied, "--to", target, "-o", out) == (0, [])
    assert out.exists()


def test_a_patch_imports_nothing_heavy(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(plan_gguf(plan_merge(Checkpoint.open(tiny_tied), []).model(), "Q8_0"), file)
    for arguments in (["-o", tmp_path / "out.gguf"], ["--in-place"]):
        assert run_and_list("patch", file, tiny_adapter, *arguments) == (0, [])


def test_a_patch_of_onnx_models_parses_them_and_imports_nothing_else_heavy(
    tiny_adapter: Path, tiny_tied: Path, tmp_path: Path
) -> None:
    base = tmp_path / "onnx"
    layout = plan_onnx(plan_merge(Checkpoint.open(tiny_tied), []).model("F32"), choose(None, ["int8", "q4"]))
    write_onnx(layout, base)
    for arguments in (["-o", tmp_path / "out"], ["--in-place"]):
        assert run_and_list("patch", base, tiny_adapter, *arguments) == (0, ["onnx"])
    assert run_and_list("plan", base, tiny_adapter) == (0, ["onnx"])


def test_a_report_is_drawn_without_what_runs_models(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    arguments = ["--report", tmp_path / "report", "-o", tmp_path / "out"]
    assert run_and_list("merge", tiny_adapter, "--base", tiny_tied, *arguments) == (0, list(REPORTING))


def test_a_plan_imports_nothing_heavy(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    targets = ["--to", "hf", "--to", "gguf", "-o", tmp_path / "out"]
    assert run_and_list("plan", tiny_adapter, "--base", tiny_tied, *targets) == (0, [])


def test_inspecting_imports_nothing_heavy(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(plan_gguf(plan_merge(Checkpoint.open(tiny_tied), []).model(), None), file)
    for path in (tiny_adapter, tiny_tied, file):
        assert run_and_list("inspect", path) == (0, [])


def test_the_probe_sees_what_a_command_imports(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    _, loaded = run_and_list("merge", tiny_adapter, "--base", tiny_tied, "--to", "onnx", "-o", tmp_path / "onnx")
    assert "onnx_ir" in loaded or "onnx" in loaded
