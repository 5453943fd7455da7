"""Every format of a real model, SmolLM2-135M-Instruct, with rows made by stock PEFT and by our own tuner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.cli.main import run
from exporter.sources.hf.checkpoint import Checkpoint
from tests.marks import needs_llama_cpp
from tests.support.documents import read_report
from tests.support.trained import NEW_TOKENS

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.slow,
    needs_llama_cpp,
]


@pytest.fixture(scope="module")
def tuned_adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three new tokens and a known one, after a few steps of our tuner; the quality of the rows does not matter."""
    folder = tmp_path_factory.mktemp("tune")
    lines = [{"text": f"{token} opens the door number {n}.<|im_end|>"} for n, token in enumerate(NEW_TOKENS * 2)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokens = [argument for token in NEW_TOKENS for argument in ("--new-token", token)]
    argv = ["tune", str(smollm2), "--data", str(folder / "data.jsonl"), *tokens, "--token", "<|im_end|>"]
    assert run([*argv, "--steps", "3", "--batch-size", "2", "-q", "-o", str(folder / "adapter")]) == 0
    return folder / "adapter"


def verified(adapter: Path, base: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Write every format and storage, verify all against one reference; artifact → its report."""
    common = ["merge", str(adapter), "--base", str(base), "--verify", "off", "-q"]
    assert run([*common, "--to", "hf", "--to", "gguf", "--to", "onnx", "-o", str(out)]) == 0
    for storage in (["--dtype", "f32"], ["--quant", "Q8_0"]):
        assert run([*common, "--to", "gguf", *storage, "-o", str(out / "gguf" / f"m-{storage[1]}.gguf")]) == 0
    argv = ["verify", str(out), "--reference", str(base), "--adapter", str(adapter), "-q", "--report", str(out)]
    assert run(argv) == 0
    document = read_report(out)
    return {Path(report["artifact"]).name: report for report in document["artifacts"]}


def checks(report: dict[str, Any]) -> dict[str, Any]:
    return {check["name"]: check for check in report["checks"]}


def assert_equivalent(reports: dict[str, dict[str, Any]]) -> None:
    bf16 = next(name for name in reports if name.endswith("-BF16.gguf"))
    assert checks(reports["hf"])["logits"]["value"] <= 1e-5
    assert checks(reports["hf"])["tie"]["passed"]
    assert checks(reports["hf"])["other tensors"]["passed"]
    assert checks(reports["m-f32.gguf"])["mean KL"]["value"] <= 1e-6
    assert checks(reports["m-f32.gguf"])["top-1 misses"]["value"] == 0
    assert (
        checks(reports["m-f32.gguf"])["greedy tokens"]["detail"]
        == "128 of 128 greedy tokens equal the reference's tokens"
    )
    assert checks(reports[bf16])["mean KL"]["value"] <= 5e-4
    assert checks(reports["m-Q8_0.gguf"])["excess KL"]["value"] <= 0.10
    for check in ("logits", "logits with cache", "logits left-padded"):
        assert checks(reports["onnx"])[check]["value"] <= 2e-4


def test_rows_of_stock_peft_survive_in_every_format(smollm2: Path, smollm2_adapter: Path, tmp_path: Path) -> None:
    reports = verified(smollm2_adapter, smollm2, tmp_path / "out")
    assert len(reports) == 5
    assert_equivalent(reports)
    merged = Checkpoint.open(tmp_path / "out" / "hf")
    assert merged.stored_head is None
    assert merged.tensors.keys() == Checkpoint.open(smollm2).tensors.keys()


def test_rows_of_our_tuner_with_new_tokens_survive_in_every_format(
    smollm2: Path, tuned_adapter: Path, tmp_path: Path
) -> None:
    reports = verified(tuned_adapter, smollm2, tmp_path / "out")
    assert len(reports) == 5
    assert_equivalent(reports)
    rows = Checkpoint.open(tmp_path / "out" / "hf").config["vocab_size"]
    assert rows == Checkpoint.open(smollm2).config["vocab_size"] + len(NEW_TOKENS)
