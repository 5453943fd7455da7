"""``ttexport plan`` as users and release automation call it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from exporter.cli.main import run
from fixtures import zoo

Capture = pytest.CaptureFixture[str]


def test_plan_writes_nothing_and_shows_size_and_ledger(
    tiny_adapter: Path, tiny_tied: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [str(tiny_adapter), "--base", str(tiny_tied), "--to", "hf", "--to", "gguf", "--to", "onnx"]
    assert run(["plan", *argv, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    assert {entry["tensor"].rsplit(".", 2)[-2] for entry in document["ledger"]} == {"embed_tokens", "lm_head"}
    assert run(["merge", *argv, "-o", "out", "-q"]) == 0
    gguf = next(target for target in document["targets"] if target["format"] == "gguf")
    assert gguf["nbytes"] == (tmp_path / "out" / "gguf" / Path(gguf["path"]).name).stat().st_size
    assert run(["plan", *argv]) == 0
    shown = capsys.readouterr().out
    assert "rows of the embedding and the tied head" in shown


def test_plan_names_the_target_that_cannot_represent_the_model(
    tiny_tied: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # in which no converter is installed
    other = Path(shutil.copytree(tiny_tied, tmp_path / "novel"))
    config = json.loads((other / "config.json").read_text()) | {"model_type": "novel"}
    (other / "config.json").write_text(json.dumps(config))
    assert run(["plan", str(other), "--to", "hf", "--to", "gguf", "--json"]) == 5
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert captured.err.count("\n") == 1
    assert [target["expressible"] for target in document["targets"]] == [True, False]
    assert "novel" in document["targets"][1]["reason"]


def test_plan_prints_one_line_for_the_same_tensor_of_all_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = zoo.build("llama", tmp_path / "base")
    adapter = zoo.lora_adapter(base, tmp_path / "adapter")
    capsys.readouterr()
    assert run(["plan", str(adapter), "--base", str(base)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "q_proj.lora_A" in line]
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    assert layers > 1
    key, count, *_, into = (*lines[0],)
    assert len(lines) == 1
    assert key.endswith("layers.*.self_attn.q_proj.lora_A.weight")
    assert count == str(layers)
    assert into.endswith("layers.*.self_attn.q_proj.weight")
