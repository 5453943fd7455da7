"""Encoder-decoders: traced as an encoder and a decoder, with the input names of Optimum and transformers.js."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from exporter.cli.main import run
from exporter.sources.onnx.file import OnnxFile
from fixtures import adapters as stock
from fixtures.models import seq2seq
from fixtures.models.seq2seq import HEADS, HIDDEN, LAYERS, VOCAB
from tests.support.trained import T5_IDS
from tests.verify.damage.corruptions import base_row, copy, poke

pytestmark = pytest.mark.slow

ENCODER, DECODER = "encoder_model.onnx", "decoder_model_merged.onnx"
CACHE = [
    f"{layer}.{side}.{part}" for layer in range(LAYERS) for side in ("decoder", "encoder") for part in ("key", "value")
]


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A T5 of version 1.1 with an untied head, and an adapter with rows for embedding and head."""
    folder = tmp_path_factory.mktemp("t5-untied")
    base = seq2seq.build(folder / "base", "flan", tied=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT reads the flag, which is true for every T5
        return base, stock.stock_rows(base, folder / "adapter", T5_IDS, targets=("shared", "lm_head"))


def export(base: Path, adapter: Path, out: Path) -> list[str]:
    return ["merge", str(adapter), "--base", str(base), "--to", "onnx", "-o", str(out), "-q"]


def checks(artifact: Path, base: Path, adapter: Path, report: Path, *, code: int = 0) -> dict[str, dict[str, Any]]:
    argv = ["verify", str(artifact), "--reference", str(base), "--adapter", str(adapter), "--report", str(report), "-q"]
    assert run(argv) == code
    (verified,) = json.loads((report / "report.json").read_text())["artifacts"]
    return {check["name"]: check for check in verified["checks"]}


def dims(path: Path) -> dict[str, list[str | int]]:
    graph = onnx.load(path, load_external_data=False).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }


def test_a_tied_model_is_verified_in_onnx_runtime(
    t5_exported: Path, t5_tied: tuple[Path, Path], tmp_path: Path
) -> None:
    results = checks(t5_exported, *t5_tied, tmp_path)
    runs = {"logits", "logits with cache", "logits right-padded", "greedy tokens"}
    assert results.keys() >= {"embedding rows", "embedding untouched", "encoder embedding rows"} | runs
    assert all(check["passed"] for check in results.values())


def test_an_untied_model_gets_the_rows_of_both(untied: tuple[Path, Path], tmp_path: Path) -> None:
    assert run(export(*untied, tmp_path / "out")) == 0
    results = checks(tmp_path / "out", *untied, tmp_path / "report")
    assert results.keys() >= {"embedding rows", "encoder embedding rows", "head rows", "head untouched", "logits"}
    file = OnnxFile.open(tmp_path / "out" / "onnx" / DECODER)
    assert file.embedding != file.head


@pytest.mark.parametrize("model_type", ["mt5", "umt5", "bart"])
def test_related_models_are_verified(model_type: str, tmp_path: Path) -> None:
    base = seq2seq.build(tmp_path / "base", model_type)
    assert run(["--to", "onnx", str(base), "-o", str(tmp_path / "out"), "--verify", "full", "-q"]) == 0


def test_files_and_names_are_those_that_clients_look_for(t5_exported: Path) -> None:
    names = {f"{name}{suffix}" for name in (ENCODER, DECODER) for suffix in ("", "_data")}
    assert {path.name for path in (t5_exported / "onnx").iterdir()} == names
    config = json.loads((t5_exported / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {ENCODER: 1, DECODER: 1}
    for name in (ENCODER, DECODER):
        onnx.checker.check_model(str(t5_exported / "onnx" / name), full_check=True)
    assert dims(t5_exported / "onnx" / ENCODER) == {
        "input_ids": ["batch_size", "encoder_sequence_length"],
        "attention_mask": ["batch_size", "encoder_sequence_length"],
        "last_hidden_state": ["batch_size", "encoder_sequence_length", HIDDEN],
    }
    decoder_dims = dims(t5_exported / "onnx" / DECODER)
    lengths = {"decoder": "past_sequence_length", "encoder": "past_encoder_sequence_length"}
    totals = {"decoder": "total_sequence_length", "encoder": "encoder_sequence_length"}
    assert decoder_dims == {
        "input_ids": ["batch_size", "sequence_length"],
        "encoder_attention_mask": ["batch_size", "encoder_sequence_length"],
        "encoder_hidden_states": ["batch_size", "encoder_sequence_length", HIDDEN],
        "use_cache_branch": [1],
        "logits": ["batch_size", "sequence_length", VOCAB + 2],
        **{f"past_key_values.{name}": ["batch_size", HEADS, lengths[name.split(".")[1]], 8] for name in CACHE},
        **{f"present.{name}": ["batch_size", HEADS, totals[name.split(".")[1]], 8] for name in CACHE},
    }
    # Optimum pairs them with its tuples by order.
    assert [name for name in decoder_dims if name.startswith("past")] == [f"past_key_values.{name}" for name in CACHE]


def test_inspect_lists_the_encoder_and_the_decoder(t5_exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["inspect", str(t5_exported), "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [(model["file"], model["precision"]) for model in models] == [
        (f"onnx/{ENCODER}", "F32"),
        (f"onnx/{DECODER}", "F32"),
    ]


def test_each_file_holds_each_of_its_weights_once(t5_exported: Path) -> None:
    decoder, encoder = (OnnxFile.open(t5_exported / "onnx" / name) for name in (DECODER, ENCODER))
    assert decoder.embedding == decoder.head
    assert encoder.embedding
    for file in (decoder, encoder):
        large = [tensor for tensor in file.initialisers.values() if VOCAB + 2 in tensor.shape]
        assert len(large) == 1
        assert all(tensor.place for tensor in large)


def test_nodes_and_weights_carry_the_path_of_their_module(t5_exported: Path) -> None:
    model = onnx.load(t5_exported / "onnx" / DECODER, load_external_data=False)
    path = "decoder.block.1.layer.1.EncDecAttention.k"
    assert any(node.op_type == "MatMul" and node.name.startswith(f"{path}.") for node in model.graph.node)
    assert f"{path}.weight" in {tensor.name for tensor in model.graph.initializer}
    assert str(Path.cwd()) not in str(model)
    assert "ttexport.base.embedding_sha256" in {prop.key for prop in model.metadata_props}


def test_two_runs_give_the_same_bytes(t5_exported: Path, t5_tied: tuple[Path, Path], tmp_path: Path) -> None:
    assert run(export(*t5_tied, tmp_path / "again")) == 0
    for path in sorted((t5_exported / "onnx").iterdir()):
        other = tmp_path / "again" / "onnx" / path.name
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()


def test_an_unused_cache_changes_nothing(t5_exported: Path) -> None:
    """Clients without empty tensors give a cache of one position in the first call, with the flag that it is unused."""
    session = onnxruntime.InferenceSession(t5_exported / "onnx" / DECODER, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feeds = {
        "input_ids": random.integers(5, VOCAB, (1, 4)),
        "encoder_attention_mask": np.ones((1, 6), np.int64),
        "encoder_hidden_states": random.standard_normal((1, 6, HIDDEN), np.float32),
        "use_cache_branch": np.array([False]),
    }

    def logits(length: int) -> Any:
        past = random.standard_normal((1, HEADS, length, 8), np.float32)
        return session.run(["logits"], {**feeds, **{f"past_key_values.{name}": past for name in CACHE}})[0]

    np.testing.assert_array_equal(logits(0), logits(1))


def test_rows_missing_in_the_encoder_are_caught(t5_exported: Path, t5_tied: tuple[Path, Path], tmp_path: Path) -> None:
    broken = copy(t5_exported, tmp_path)
    file = OnnxFile.open(broken / "onnx" / ENCODER)
    assert file.embedding
    [place] = file.token_places(file.embedding, T5_IDS[0])
    poke(place.path, place.offset_bytes, base_row(t5_tied[0], T5_IDS[0]).tobytes())
    results = checks(broken, *t5_tied, tmp_path / "report", code=3)
    assert not results["encoder embedding rows"]["passed"]
    assert results["embedding rows"]["passed"]


def test_a_decoder_that_forgets_its_cache_is_caught(
    t5_exported: Path, t5_tied: tuple[Path, Path], tmp_path: Path
) -> None:
    broken = copy(t5_exported, tmp_path)
    path = broken / "onnx" / DECODER
    model = onnx.load(path, load_external_data=False)
    (counting,) = (node for node in model.graph.node if node.name == "cache.counting")
    counting.input[1] = counting.input[2]
    onnx.save(model, path)
    results = checks(broken, *t5_tied, tmp_path / "report", code=3)
    assert results["logits"]["passed"]
    assert not results["logits with cache"]["passed"]


def test_a_patch_of_an_encoder_decoder_is_refused(
    t5_exported: Path, t5_tied: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = t5_tied
    args = ["patch", str(t5_exported), str(adapter), "--base", str(base), "-o", str(tmp_path / "out")]
    assert run(args) == 5
    error = capsys.readouterr().err
    assert f"patch: {t5_exported}: an encoder-decoder cannot be patched" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
