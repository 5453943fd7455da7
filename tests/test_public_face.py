"""``import ttexport``: what it names, what it costs, and ten lines that merge and export."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ttexport
from exporter.cli.main import VERBS
from exporter.sources.gguf.file import GgufFile
from exporter.sources.hf.checkpoint import Checkpoint

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "peft", "onnxruntime", "onnx", "onnx_ir", "llama_cpp", "numpy")


def test_the_face_names_these_and_no_others() -> None:
    assert sorted(ttexport.__all__) == [
        "BadInput", "Check", "ExportPlan", "Exported", "ExportedArtifact", "GgufLoraOptions", "GgufOptions",
        "HfOptions", "Hooks", "MergeOptions", "MissingDependency", "NotEquivalent", "NotExpressible", "OnnxOptions",
        "OutputError", "Patched", "Release", "Report", "Skip", "TTExportError", "TuneSpec", "Tuned", "UsageError",
        "VerifyOptions", "__version__", "export", "inspect", "merge", "patch", "plan", "release", "tune", "verify",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ttexport.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    member = getattr(ttexport, name)
    assert isinstance(member, str) or inspect.getdoc(member)
    with pytest.raises(AttributeError, match=f"no attribute '{name}_'"):
        getattr(ttexport, f"{name}_")


#: The verbs that make or check something. The verb ``converter`` prepares the machine, and is used once by hand.
FUNCTIONS = set(VERBS) - {"converter"}


def test_every_verb_is_a_function() -> None:
    assert set(ttexport.__all__) >= FUNCTIONS


@pytest.mark.parametrize("verb", sorted(FUNCTIONS))
def test_functions_are_typed(verb: str) -> None:
    signature = inspect.signature(getattr(ttexport, verb))
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(one.annotation is not inspect.Parameter.empty for one in signature.parameters.values())


def test_importing_it_imports_nothing_heavy() -> None:
    code = f"import json, sys, ttexport; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_ten_lines_merge_and_export(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    made = ttexport.merge(
        tiny_adapter,
        base=tiny_tied,
        to=["hf", ttexport.GgufOptions(types=("Q8_0", "f32"))],
        out=tmp_path / "out",
        verify="weights",
    )
    assert [artifact.storage for artifact in made.artifacts] == ["BF16", "Q8_0", "F32"]
    assert all(artifact.report and artifact.report.passed for artifact in made.artifacts)
    assert Checkpoint.open(made.artifacts[0].path).tensors
    again = ttexport.export(made.artifacts[0].path, to="gguf", out=tmp_path / "again.gguf", verify="off")
    (artifact,) = again.artifacts
    assert artifact.report is None
    assert GgufFile.open(artifact.path).tensors["token_embd.weight"].type == "BF16"


def test_plan_writes_nothing(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    made = ttexport.plan(tiny_adapter, base=tiny_tied, to="gguf", out=tmp_path / "x.gguf")
    assert made.to_json()["targets"][0]["expressible"]
    assert list(tmp_path.iterdir()) == []


def test_patch_verify_and_inspect(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    base = ttexport.export(tiny_tied, to="gguf", out=tmp_path / "base.gguf", verify="off").out
    patched = ttexport.patch(base, tiny_adapter, out=tmp_path / "tuned.gguf", checkpoint=tiny_tied)
    assert patched.report
    assert patched.report.passed
    assert ttexport.inspect(patched.paths[0])["facts"]["kind"] == "gguf"
    options = ttexport.VerifyOptions(level="weights")
    (report,) = ttexport.verify(patched.paths[0], reference=tiny_tied, adapters=[tiny_adapter], options=options)
    assert report.passed
    (wrong,) = ttexport.verify(base, reference=tiny_tied, adapters=[tiny_adapter], options=options)
    assert not wrong.passed


def test_errors_name_arguments(tmp_path: Path) -> None:
    with pytest.raises(ttexport.UsageError, match="to: expected hf, gguf, gguf-lora, onnx, found 'tflite'"):
        ttexport.merge(tmp_path, to="tflite")
    with pytest.raises(ttexport.UsageError, match="level: expected off, rows, weights, full, found 'auto'"):
        ttexport.merge(tmp_path, verify="auto")
    with pytest.raises(ttexport.BadInput, match="expected a path or a hub id"):
        ttexport.merge(tmp_path / "nothing")
