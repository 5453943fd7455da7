"""Each check of a patched folder fails on damage to what it compares."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporter.sources.onnx.file import OnnxFile
from exporter.sources.onnx.folder import model_files
from exporter.sources.peft.adapter import Adapter
from exporter.tensors import Array
from exporter.verify.patched.onnx import Before, check_patched
from exporter.verify.stored.onnx_blocks import BlockStorage
from tests.patch.onnx.test_rows import options, succeed

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def pair(
    tiny_tied: Path, tiny_new_tokens_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """(base, patched folder, adapter)"""
    folder = tmp_path_factory.mktemp("gates")
    succeed("export", tiny_tied, *options("fp32", "q4"), "--verify", "off", "-o", folder / "base")
    (folder / "base" / "README.md").write_text("read me")
    succeed("patch", folder / "base", tiny_new_tokens_adapter, "--verify", "off", "-o", folder / "patched")
    return folder / "base", folder / "patched", tiny_new_tokens_adapter


def flip(folder: Path, tensor: str, token: int, model: str = "model") -> None:
    """One bit of the first byte of a row."""
    stored = OnnxFile.open(folder / "onnx" / f"{model}.onnx").initialisers[tensor]
    assert stored.place
    at = stored.place.offset_bytes + token * (stored.nbytes // stored.shape[0])
    data = bytearray(stored.place.path.read_bytes())
    data[at] ^= 16
    stored.place.path.write_bytes(data)


def graph(change: Callable[[onnx.ModelProto], object]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "onnx" / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        change(model)
        path.write_bytes(model.SerializeToString())

    return damage


def config(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def swap_inputs(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def another_epsilon(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "RMSNormalization")
    next(attribute for attribute in node.attribute if attribute.name == "epsilon").f = 1e-6


def another_constant(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "vector_515")
    tensor.raw_data = np.array([514]).tobytes()


DAMAGES: dict[str, tuple[Damage, str]] = {
    "trained row": (lambda folder: flip(folder, "embed_tokens.weight", 300), "model: embed_tokens.weight rows"),
    "new row": (lambda folder: flip(folder, "embed_tokens.weight", 514), "model: embed_tokens.weight rows"),
    "codes": (
        lambda folder: flip(folder, "embed_tokens.weight", 300, "model_q4"),
        "model_q4: embed_tokens.weight rows",
    ),
    "scale": (
        lambda folder: flip(folder, "embed_tokens.scales", 300, "model_q4"),
        "model_q4: embed_tokens.weight rows",
    ),
    "neighbour": (lambda folder: flip(folder, "embed_tokens.weight", 301), "model: untouched"),
    "other tensor": (lambda folder: flip(folder, "layers.1.mlp.up_proj.weight", 0), "model: untouched"),
    "graph": (graph(swap_inputs), "model: graph"),
    "attribute": (graph(another_epsilon), "model: graph"),
    "constant": (graph(another_constant), "model: graph"),
    "metadata": (graph(lambda model: model.metadata_props.pop()), "model: graph"),
    "readme": (lambda folder: (folder / "README.md").unlink(), "other files"),
    "stray file": (lambda folder: (folder / "onnx" / "x").write_text(""), "other files"),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer files"),
    "size": (config("config.json", lambda content: content.update(vocab_size=512)), "configs"),
    "setting": (config("config.json", lambda content: content.update(rope_theta=5)), "configs"),
    "genai size": (config("genai_config.json", lambda content: content["model"].update(vocab_size=512)), "configs"),
    "end of text": (config("config.json", lambda content: content.update(eos_token_id=7)), "special ids"),
}


@pytest.mark.parametrize("every", [False, True], ids=["samples", "every byte"])
@pytest.mark.parametrize("what", DAMAGES)
def test_a_damage_is_found(pair: tuple[Path, Path, Path], tmp_path: Path, what: str, every: bool) -> None:
    base, patched, adapter = pair
    damage, check = DAMAGES[what]
    before = Before.read(base, model_files(base), [Adapter.open(adapter)], every=every)
    copy = Path(shutil.copytree(patched, tmp_path / "copy"))
    assert all(result.passed for result in check_patched(copy, before))
    damage(copy)
    assert [result.name for result in check_patched(copy, before) if not result.passed] == [check]


@pytest.mark.parametrize("scales", ["F32", "F16"])
@pytest.mark.parametrize(("bits", "zeros"), [(4, False), (4, True), (8, False), (8, True)])
def test_blocks_are_compared_as_the_runtimes_quantiser_makes_them(bits: int, zeros: bool, scales: str) -> None:
    rows: Array = np.random.default_rng(bits).normal(size=(40, 96)).astype(np.float32)
    rows[0] = 0
    rows[1, :32] = 0
    rows[2] = np.abs(rows[2])
    storage = BlockStorage(bits, 32, zeros, scales)
    raw = storage.encode(rows)
    assert storage.holds(rows, raw).all()
    for byte in range(raw.shape[1]):
        wrong = raw.copy()
        wrong[3:, byte] ^= 2  # a neighbour may be as near as the right code
        assert not storage.holds(rows, wrong)[3:].any(), byte
    assert not storage.holds(rows * np.float32(1.001), raw)[2:].any()
