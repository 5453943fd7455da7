"""Mixtures of experts in llama.cpp: noise in a router's input sends a token to another expert."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.cli.main import run
from fixtures.adapters import stock_rows
from fixtures.models.families import build
from tests.marks import needs_llama_cpp
from tests.support.documents import read_report
from tests.verify.damage import corruptions

pytestmark = needs_llama_cpp

#: With this seed one token in Q8_0 and in BF16 goes to another expert after tuning, which raises the mean KL by half.
SEED = 0


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, rows for it, and a folder with both artifacts."""
    folder = tmp_path_factory.mktemp("mixture")
    base = build("qwen3_moe", folder / "base")
    adapter = stock_rows(base, folder / "adapter", (300, 17, 2), seed=SEED)
    merge = ["merge", str(adapter), "--base", str(base), "--to", "gguf", "--verify", "off", "-q"]
    for storage in (["--quant", "Q8_0"], ["--dtype", "bf16"]):
        out = folder / "out" / "gguf" / f"{storage[1]}.gguf"
        out.parent.mkdir(parents=True, exist_ok=True)
        assert run([*merge, "--pre-tokenizer", "smollm", *storage, "-o", str(out)]) == 0
    return base, adapter, folder / "out"


def failed(mixture: tuple[Path, Path, Path], artifact: Path, report: Path) -> tuple[int, dict[str, set[str]]]:
    """The exit code, and the names of the failed checks by artifact."""
    base, adapter, _ = mixture
    argv = ["verify", str(artifact), "--reference", str(base), "--adapter", str(adapter), "-q"]
    code = run([*argv, "--report", str(report)])
    artifacts = read_report(report)["artifacts"]
    return code, {
        Path(entry["artifact"]).name: {check["name"] for check in entry["checks"] if not check["passed"]}
        for entry in artifacts
    }


def test_a_token_at_another_expert_is_no_fault(mixture: tuple[Path, Path, Path], tmp_path: Path) -> None:
    code, failures = failed(mixture, mixture[2], tmp_path)
    assert (code, failures) == (0, {"Q8_0.gguf": set(), "bf16.gguf": set()})
    names = [{check["name"] for check in entry["checks"]} for entry in read_report(tmp_path)["artifacts"]]
    assert {"base as stored", "excess KL", "excess KL, median"} <= names[0]
    assert {"excess KL", "median KL"} <= names[1]


def test_a_fault_that_the_quantised_base_would_share_is_found(mixture: tuple[Path, Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "gguf").mkdir(parents=True)
    for name in ("Q8_0.gguf", "bf16.gguf"):
        copy = corruptions.copy(mixture[2] / "gguf" / name, out / "gguf")
        corruptions.gguf_scale_f32(copy, "blk.1.ffn_norm.weight", 1.5)
    code, failures = failed(mixture, out, tmp_path / "report")
    assert code == 3
    assert failures == {"Q8_0.gguf": {"base as stored", "other tensors"}, "bf16.gguf": {"median KL", "other tensors"}}
