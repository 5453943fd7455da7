"""Artifacts of other tools: correct ones pass, those without the rows are exit 3 and name the failed check."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import pytest

from exporter.cli.main import run
from tests.conformance.gguf import convert, required_converter
from tests.marks import needs_llama_cpp
from tests.support.documents import read_report
from tests.verify import foreign

Build = Callable[[Path, Path], Path]

needs_genai = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is not installed"
)


def save_pretrained(merged: Path, out: Path) -> Path:
    """PEFT's merged checkpoint is itself the artifact."""
    return merged


def llama_cpp_converter(merged: Path, out: Path) -> Path:
    """convert_hf_to_gguf.py of llama.cpp."""
    convert(required_converter(), merged, out.with_suffix(".gguf"), "bf16", "smollm")
    return out.with_suffix(".gguf")


def package(merged: Path, out: Path) -> Path:
    """A file written with the gguf package."""
    return foreign.gguf_package(merged, out.with_suffix(".gguf"))


#: tool → function that makes its artifact from a merged checkpoint
TOOLS: Mapping[str, Build] = {
    "peft": save_pretrained,
    "gguf": package,
    "converter": llama_cpp_converter,
    "genai-fp32": partial(foreign.genai, precision="fp32"),
    "genai-int4": partial(foreign.genai, precision="int4"),
    "torch.onnx.export": foreign.torch_export,
}
MARKS = {
    "gguf": needs_llama_cpp,
    "converter": pytest.mark.converter,
    "genai-fp32": needs_genai,
    "genai-int4": needs_genai,
}
CASES = [pytest.param(tool, marks=MARKS.get(tool, ())) for tool in TOOLS]


@pytest.fixture(scope="session")
def merged_by_peft(tiny_tied: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign.merge(tiny_tied, tiny_adapter, tmp_path_factory.mktemp("foreign") / "merged")


@pytest.fixture(scope="session")
def saved_without_rows(tiny_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign.merge(tiny_tied, None, tmp_path_factory.mktemp("foreign") / "lost")


@pytest.fixture(scope="session")
def made(merged_by_peft: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tool → its artifact of the merged checkpoint, built once."""
    folder = tmp_path_factory.mktemp("made")
    return cache(lambda tool: TOOLS[tool](merged_by_peft, folder / tool))


def verify(artifact: Path, base: Path, adapter: Path, report: Path) -> int:
    argv = ["verify", str(artifact), "--reference", str(base), "--adapter", str(adapter), "-q"]
    return run([*argv, "--report", str(report)])


@pytest.mark.parametrize("tool", CASES)
def test_artifacts_of_other_tools_pass(
    tool: str, made: Callable[[str], Path], tiny_tied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    assert verify(made(tool), tiny_tied, tiny_adapter, tmp_path / "report") == 0
    names = {check["name"] for check in read_report(tmp_path / "report")["artifacts"][0]["checks"]}
    assert {"embedding rows", "embedding untouched"} <= names
    assert {"logits", "mean KL", "excess KL"} & names


@pytest.mark.parametrize("tool", CASES)
def test_artifacts_without_the_rows_fail_by_the_rows_and_by_the_logits(
    tool: str,
    saved_without_rows: Path,
    tiny_tied: Path,
    tiny_adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact = TOOLS[tool](saved_without_rows, tmp_path / "artifact")
    assert verify(artifact, tiny_tied, tiny_adapter, tmp_path / "report") == 3
    assert "not equivalent: embedding rows: " in capsys.readouterr().err
    checks = read_report(tmp_path / "report")["artifacts"][0]["checks"]
    failed = {check["name"] for check in checks if not check["passed"]}
    # In four bits, three rows are below the quantisation noise of the others; the check of their errors finds them.
    assert failed & {"logits", "mean KL", "embedding changes"}


@needs_genai
def test_a_graph_without_positions_is_padded_on_the_right(
    made: Callable[[str], Path], tiny_tied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    assert verify(made("genai-fp32"), tiny_tied, tiny_adapter, tmp_path / "report") == 0
    names = {check["name"] for check in read_report(tmp_path / "report")["artifacts"][0]["checks"]}
    assert {"logits", "logits with cache", "logits right-padded", "greedy tokens"} <= names


def test_run_modes_that_a_graph_does_not_support_are_reported_as_skipped(
    made: Callable[[str], Path], tiny_tied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    assert verify(made("torch.onnx.export"), tiny_tied, tiny_adapter, tmp_path / "report") == 0
    [document] = read_report(tmp_path / "report")["artifacts"]
    reasons = {skip["name"]: skip["reason"] for skip in document["skipped"]}
    assert reasons["logits with cache"] == "model.onnx has no past_key_values inputs"
    assert reasons["logits of a padded batch"] == "model.onnx has no attention_mask input"
    assert reasons.keys() - {"logits with cache", "logits of a padded batch"} == {
        "interface",
        "other tensors",
        "configs",
        "texts",
    }
