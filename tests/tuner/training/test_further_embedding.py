"""Models with a second embedding that has a row per token: new tokens get trained rows in both embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from exporter.cli.main import run
from fixtures import zoo
from fixtures.zoo.shrink import VOCAB


@pytest.mark.parametrize("lora", [(), ("--lora-rank", "4", "--lora-targets", "q_proj")], ids=["rows", "lora"])
def test_a_new_token_of_gemma_4_has_a_row_in_both_embeddings(lora: tuple[str, ...], tmp_path: Path) -> None:
    base = zoo.build("gemma4_text", tmp_path / "base")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"the <lamp> shines {number}"}) + "\n" for number in range(8)))
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    words = ["tune", str(base), "--data", str(data), "--new-token", "<lamp>", "--steps", "2", *lora]
    assert run([*words, "-o", str(adapter), "-q"]) == 0
    assert run(["merge", str(adapter), "--base", str(base), "-o", str(out), "-q"]) == 0
    tensors = load_file(out / "model.safetensors")
    assert len(tensors["model.embed_tokens.weight"]) == VOCAB + 1
    assert len(tensors["model.embed_tokens_per_layer.weight"]) == VOCAB + 1
    assert tensors["model.embed_tokens_per_layer.weight"][VOCAB].any()
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == config["vocab_size_per_layer_input"] == VOCAB + 1


def test_an_adapter_without_rows_of_the_second_embedding_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = zoo.build("gemma4_text", tmp_path / "base")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "the <lamp> shines"}) + "\n")
    adapter = tmp_path / "adapter"
    words = ["tune", str(base), "--data", str(data), "--new-token", "<lamp>", "--steps", "1"]
    assert run([*words, "-o", str(adapter), "-q"]) == 0
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    kept = {name: value for name, value in tensors.items() if "per_layer" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, weights)
    capsys.readouterr()
    assert run(["merge", str(adapter), "--base", str(base), "-o", str(tmp_path / "out")]) == 4
    assert "model.embed_tokens_per_layer.weight" in capsys.readouterr().err
