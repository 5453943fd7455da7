"""Full verification runs models of every class by the class that the checkpoint names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exporter.cli.main import run
from fixtures import zoo


def merged(name: str, folder: Path) -> tuple[Path, Path, Path]:
    base = zoo.build(name, folder / "base")
    adapter = zoo.rows_adapter(base, folder / "adapter")
    out = folder / "out"
    assert run(["merge", str(adapter), "--base", str(base), "-o", str(out), "--verify", "off", "-q"]) == 0
    return base, adapter, out


def verify(base: Path, adapter: Path, out: Path, *more: str) -> int:
    words = ["verify", str(out), "--reference", str(base), "--adapter", str(adapter), "--level", "full", "--json", "-q"]
    return run([*words, *more])


@pytest.mark.parametrize(
    "name",
    [
        "bert:mlm",
        "whisper",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("bert:cls", "distilbert:encoder", "qwen2_vl", "mamba", "phi")
        ),
    ],
)
def test_a_merged_model_of_another_class_is_run_and_equivalent(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter, out = merged(name, tmp_path)
    capsys.readouterr()
    assert verify(base, adapter, out) == 0
    document = json.loads(capsys.readouterr().out)
    text = json.dumps(document)
    assert '"logits"' in text
    generates = name in ("qwen2_vl", "phi")
    assert ("does not generate text" in text) != generates


def test_a_changed_weight_of_a_classifier_is_found_by_its_logits(tmp_path: Path) -> None:
    base, adapter, out = merged("bert:cls", tmp_path)
    tensors = load_file(out / "model.safetensors")
    tensors["classifier.weight"] = (tensors["classifier.weight"] * np.float32(1.05)).astype(np.float32)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    assert verify(base, adapter, out, "--report", str(tmp_path / "report")) == 3
    text = (tmp_path / "report" / "report.json").read_text()
    (report,) = json.loads(text)["artifacts"]
    assert {check["name"] for check in report["checks"] if not check["passed"]} >= {"logits"}
