"""Models that no family describes: traced by torch.onnx, with the same names, layout and verification."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, PhiConfig

from exporter.cli.main import run
from exporter.families import FAMILIES
from exporter.sources.onnx.file import OnnxFile
from fixtures import adapters as stock
from fixtures.tiny import build_tokenizer
from tests.formats.onnx import reference
from tests.formats.onnx.conftest import random_ids
from tests.formats.onnx.test_logits import SMOLLM2_MAX_ABS, assert_same

VOCAB = 512
SHAPE: Any = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "phi": PhiConfig(**SHAPE, intermediate_size=64, max_position_embeddings=128, eos_token_id=2, bos_token_id=1),
    "opt": OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=128, eos_token_id=2),
}
SEQUENCES = [random_ids(30, VOCAB, 0), random_ids(5, VOCAB, 1)]


@pytest.fixture(scope="session", params=list(CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of a type without a family, and token rows for it."""
    assert request.param not in FAMILIES
    folder = tmp_path_factory.mktemp("traced")
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    model.save_pretrained(folder / "base")
    build_tokenizer(VOCAB).save_pretrained(folder / "base")
    return folder / "base", stock.stock_rows(folder / "base", folder / "adapter", [3, 300, 17])


@pytest.fixture(scope="session")
def exported(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("exported") / "out"
    base, adapter = pair
    assert run(["merge", str(adapter), "--base", str(base), "--to", "onnx", "-o", str(out)]) == 0
    return out


@pytest.mark.slow
def test_every_pattern_of_inputs_gives_the_logits_of_transformers(exported: Path, pair: tuple[Path, Path]) -> None:
    want = reference.logits(reference.load(*pair), SEQUENCES)
    assert_same(exported, want, SEQUENCES, SMOLLM2_MAX_ABS)


@pytest.mark.slow
def test_names_and_layout_are_those_of_built_graphs(exported: Path, pair: tuple[Path, Path]) -> None:
    assert {path.name for path in (exported / "onnx").iterdir()} == {"model.onnx", "model.onnx_data"}
    assert {path.name for path in exported.iterdir()} >= {"config.json", "tokenizer.json"}
    path = exported / "onnx" / "model.onnx"
    onnx.checker.check_model(str(path))
    model = onnx.load(path, load_external_data=False)
    dims = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert dims["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert dims["past_key_values.1.value"] == ["batch_size", 4, "past_sequence_length", 8]
    assert dims["present.0.key"] == ["batch_size", 4, "total_sequence_length", 8]
    assert dims["logits"] == ["batch_size", "sequence_length", VOCAB]
    assert str(Path.cwd()) not in str(model)
    file = OnnxFile.open(exported)
    tied = json.loads((pair[0] / "config.json").read_text()).get("tie_word_embeddings", True)
    assert (file.embedding == file.head) == tied


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["opt"], indirect=True)
def test_two_runs_give_the_same_bytes(exported: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    assert run(["merge", str(adapter), "--base", str(base), "--to", "onnx", "-o", str(tmp_path / "again")]) == 0
    for path in sorted((exported / "onnx").iterdir()):
        other = tmp_path / "again" / "onnx" / path.name
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()


def test_a_plan_notes_the_trace(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = pair
    assert run(["plan", str(adapter), "--base", str(base), "--to", "onnx", "--json"]) == 0
    (target,) = json.loads(capsys.readouterr().out)["targets"]
    assert any("torch.onnx.export traces the model" in note for note in target["notes"])
