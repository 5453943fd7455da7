"""Encoder-decoders: traced as an encoder and one decoder, under the names that Optimum and transformers.js feed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from exporter.cli.main import run
from exporter.sources.onnx import OnnxFile
from fixtures import adapters as stock
from fixtures import seq2seq
from fixtures.seq2seq import HEADS, HIDDEN, LAYERS, VOCAB
from tests.verify.corruptions import base_row, copy, poke

pytestmark = pytest.mark.slow

ENCODER, DECODER = "encoder_model.onnx", "decoder_model_merged.onnx"
IDS = (300, 17, 5)
CACHE = [
    f"{layer}.{side}.{part}" for layer in range(LAYERS) for side in ("decoder", "encoder") for part in ("key", "value")
]


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A T5 with one matrix for all, whose head is scaled, and rows for it, some of them new."""
    folder = tmp_path_factory.mktemp("t5-tied")
    base = seq2seq.build(folder / "base", "t5")
    return base, stock.stock_rows_new_tokens(base, folder / "adapter", ["<lamp>", "<ship>"], IDS)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A T5 of version 1.1 with a head of its own, and different rows for both."""
    folder = tmp_path_factory.mktemp("t5-untied")
    base = seq2seq.build(folder / "base", "flan", tied=False)
    return base, stock.stock_rows(base, folder / "adapter", IDS, targets=("shared", "lm_head"))


@pytest.fixture(scope="session")
def exported(tied: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("exported") / "out"
    assert run(export(*tied, out)) == 0
    return out


def export(base: Path, adapter: Path, out: Path) -> list[str]:
    return ["merge", str(adapter), "--base", str(base), "--to", "onnx", "-o", str(out), "-q"]


def checks(artifact: Path, base: Path, adapter: Path, report: Path, *, code: int = 0) -> dict[str, dict[str, Any]]:
    argv = ["verify", str(artifact), "--reference", str(base), "--adapter", str(adapter), "--report", str(report), "-q"]
    assert run(argv) == code
    (found,) = json.loads((report / "report.json").read_text())["artifacts"]
    return {check["name"]: check for check in found["checks"]}


def dims(path: Path) -> dict[str, list[str | int]]:
    graph = onnx.load(path, load_external_data=False).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }


def test_a_tied_model_is_proven_in_onnx_runtime(exported: Path, tied: tuple[Path, Path], tmp_path: Path) -> None:
    found = checks(exported, *tied, tmp_path)
    ways = {"logits", "logits with cache", "logits padded", "greedy tokens"}
    assert found.keys() >= {"embedding rows", "embedding untouched", "encoder embedding rows"} | ways
    assert all(check["passed"] for check in found.values())


def test_a_model_with_a_head_of_its_own_gets_the_rows_of_both(untied: tuple[Path, Path], tmp_path: Path) -> None:
    assert run(export(*untied, tmp_path / "out")) == 0
    found = checks(tmp_path / "out", *untied, tmp_path / "report")
    assert found.keys() >= {"embedding rows", "encoder embedding rows", "head rows", "head untouched", "logits"}
    file = OnnxFile.open(tmp_path / "out" / "onnx" / DECODER)
    assert file.embedding != file.head


@pytest.mark.parametrize("kind", ["mt5", "umt5", "bart"])
def test_relatives_are_proven_too(kind: str, tmp_path: Path) -> None:
    base = seq2seq.build(tmp_path / "base", kind)
    assert run(["--to", "onnx", str(base), "-o", str(tmp_path / "out"), "--verify", "full", "-q"]) == 0


def test_files_and_names_are_those_that_clients_look_for(exported: Path) -> None:
    names = {f"{name}{suffix}" for name in (ENCODER, DECODER) for suffix in ("", "_data")}
    assert {path.name for path in (exported / "onnx").iterdir()} == names
    config = json.loads((exported / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {ENCODER: 1, DECODER: 1}
    for name in (ENCODER, DECODER):
        onnx.checker.check_model(str(exported / "onnx" / name), full_check=True)
    assert dims(exported / "onnx" / ENCODER) == {
        "input_ids": ["batch_size", "encoder_sequence_length"],
        "attention_mask": ["batch_size", "encoder_sequence_length"],
        "last_hidden_state": ["batch_size", "encoder_sequence_length", HIDDEN],
    }
    found = dims(exported / "onnx" / DECODER)
    lengths = {"decoder": "past_sequence_length", "encoder": "past_encoder_sequence_length"}
    totals = {"decoder": "total_sequence_length", "encoder": "encoder_sequence_length"}
    assert found == {
        "input_ids": ["batch_size", "sequence_length"],
        "encoder_attention_mask": ["batch_size", "encoder_sequence_length"],
        "encoder_hidden_states": ["batch_size", "encoder_sequence_length", HIDDEN],
        "use_cache_branch": [1],
        "logits": ["batch_size", "sequence_length", VOCAB + 2],
        **{f"past_key_values.{name}": ["batch_size", HEADS, lengths[name.split(".")[1]], 8] for name in CACHE},
        **{f"present.{name}": ["batch_size", HEADS, totals[name.split(".")[1]], 8] for name in CACHE},
    }
    # Optimum pairs them with its tuples by their order.
    assert [name for name in found if name.startswith("past")] == [f"past_key_values.{name}" for name in CACHE]


def test_each_file_holds_each_of_its_weights_once(exported: Path) -> None:
    decoder, encoder = (OnnxFile.open(exported / "onnx" / name) for name in (DECODER, ENCODER))
    assert decoder.embedding == decoder.head
    assert encoder.embedding
    for file in (decoder, encoder):
        large = [one for one in file.initialisers.values() if one.shape[:1] == (VOCAB + 2,) or VOCAB + 2 in one.shape]
        assert len(large) == 1
        assert all(one.place for one in large)


def test_nodes_and_weights_carry_the_path_of_their_module(exported: Path) -> None:
    model = onnx.load(exported / "onnx" / DECODER, load_external_data=False)
    path = "decoder.block.1.layer.1.EncDecAttention.k"
    assert any(node.op_type == "MatMul" and node.name.startswith(f"{path}.") for node in model.graph.node)
    assert f"{path}.weight" in {one.name for one in model.graph.initializer}
    assert str(Path.cwd()) not in str(model)
    assert "ttexport.base.embedding_sha256" in {prop.key for prop in model.metadata_props}


def test_two_runs_give_the_same_bytes(exported: Path, tied: tuple[Path, Path], tmp_path: Path) -> None:
    assert run(export(*tied, tmp_path / "again")) == 0
    for path in sorted((exported / "onnx").iterdir()):
        twin = tmp_path / "again" / "onnx" / path.name
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(twin.read_bytes()).digest()


def test_a_cache_that_does_not_count_changes_nothing(exported: Path) -> None:
    """Clients without empty tensors give a cache of one position at the first call, and say that it is none."""
    session = onnxruntime.InferenceSession(exported / "onnx" / DECODER, providers=["CPUExecutionProvider"])
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


def test_rows_that_only_the_decoder_got_are_caught(exported: Path, tied: tuple[Path, Path], tmp_path: Path) -> None:
    broken = copy(exported, tmp_path)
    file = OnnxFile.open(broken / "onnx" / ENCODER)
    assert file.embedding
    [place] = file.token_places(file.embedding, IDS[0])
    poke(place.path, place.offset_bytes, base_row(tied[0], IDS[0]).tobytes())
    found = checks(broken, *tied, tmp_path / "report", code=3)
    assert not found["encoder embedding rows"]["passed"]
    assert found["embedding rows"]["passed"]


def test_a_decoder_that_forgets_its_cache_is_caught(exported: Path, tied: tuple[Path, Path], tmp_path: Path) -> None:
    broken = copy(exported, tmp_path)
    path = broken / "onnx" / DECODER
    model = onnx.load(path, load_external_data=False)
    (counting,) = (node for node in model.graph.node if node.name == "cache.counting")
    counting.input[1] = counting.input[2]
    onnx.save(model, path)
    found = checks(broken, *tied, tmp_path / "report", code=3)
    assert found["logits"]["passed"]
    assert not found["logits with cache"]["passed"]
