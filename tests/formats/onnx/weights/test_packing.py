"""With ONNX Runtime's operators, queries, keys and values of a layer are one matrix if its attention can read it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from exporter.errors import BadInput
from exporter.sources.onnx.file import OnnxFile
from exporter.tensors import Array
from fixtures import tiny
from fixtures.models import families
from tests.formats.onnx.conftest import Change, Write

PARTS = ("q_proj", "k_proj", "v_proj")
AT = "layers.1.self_attn"


def value(file: OnnxFile, name: str) -> Array:
    """The bytes of an initialiser, as a matrix of its first axis."""
    return file.rows(name, 0, file.initialisers[name].shape[0])


def float_matrix(folder: Path, module: str) -> Array:
    file = OnnxFile.open(folder)
    name = f"{module}.weight"
    matrix: Array = value(file, name).view(np.float32).reshape(file.initialisers[name].shape)
    return matrix


def products(folder: Path, stem: str = "model") -> set[str]:
    """Attention modules of all layers that are matrix products in the graph."""
    graph = onnx.load(folder / "onnx" / f"{stem}.onnx", load_external_data=False).graph
    modules = {node.name for node in graph.node if ".self_attn." in node.name and node.op_type.startswith("MatMul")}
    return {name.removesuffix(".product") for name in modules}  # a bias is added to this product


def test_columns_of_the_packed_matrix_are_those_of_the_three(write: Write, tiny_tied: Path) -> None:
    apart, together = write(tiny_tied), write(tiny_tied, ops="ort")
    want = np.concatenate([float_matrix(apart, f"{AT}.{part}") for part in PARTS], axis=1)
    assert np.array_equal(float_matrix(together, f"{AT}.qkv_proj"), want)
    assert products(together) == {f"layers.{n}.self_attn.{name}" for n in (0, 1) for name in ("qkv_proj", "o_proj")}


def test_blocks_of_the_packed_matrix_are_those_of_the_three(write: Write, tiny_tied: Path) -> None:
    """Rows quantise independently of each other, so packing changes no code and no scale."""
    apart, together = (OnnxFile.open(write(tiny_tied, quants=("int8",), ops=ops)) for ops in ("standard", "ort"))
    for suffix in ("weight", "scales"):
        want = np.concatenate([value(apart, f"{AT}.{part}.{suffix}") for part in PARTS])
        assert np.array_equal(value(together, f"{AT}.qkv_proj.{suffix}"), want)


def test_biases_are_packed_too(write: Write, tmp_path: Path) -> None:
    base = families.build("qwen2", tmp_path / "base", dtype="float32")
    apart, together = (OnnxFile.open(write(base, ops=ops)) for ops in ("standard", "ort"))
    want = np.concatenate([value(apart, f"{AT}.{part}.bias") for part in PARTS])
    assert np.array_equal(value(together, f"{AT}.qkv_proj.bias"), want)


def test_a_layer_that_stores_them_in_different_bits_keeps_three(write: Write, tmp_path: Path) -> None:
    """Queries have 4 bits and keys 8, except in the layers at the ends; without zero points all have 8."""
    folder = write(tiny.build_llama(tmp_path / "deep", layers=8), quants=("q4", "q4-sym"), ops="ort")
    assert not {name for name in products(folder, "model_sym_q4") if name.endswith(".q_proj")}
    modules = products(folder, "model_q4")
    packed = {layer for layer in range(8) if f"layers.{layer}.self_attn.qkv_proj" in modules}
    apart = {layer for layer in range(8) if f"layers.{layer}.self_attn.q_proj" in modules}
    assert (packed, apart) == ({0, 7}, {1, 2, 3, 4, 5, 6})


@pytest.mark.parametrize(
    ("family", "why"), [("qwen3", "norms of queries and keys"), ("stablelm", "a partial rotation")]
)
def test_operations_before_attention_keep_three(write: Write, tmp_path: Path, family: str, why: str) -> None:
    modules = products(write(families.build(family, tmp_path / "base", dtype="float32"), ops="ort"))
    assert {name for name in modules if name.startswith(AT)} >= {f"{AT}.{part}" for part in PARTS}, why


def test_the_tensor_whose_value_does_not_fit_is_named_among_three(
    change: Change, write: Write, tiny_tied: Path
) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    base = change(tiny_tied, tensors={name: torch.full((32, 64), 1e5, dtype=torch.bfloat16)})
    with pytest.raises(BadInput, match=rf"model\.safetensors: {name}: .*65504"):
        write(base, dtype="F16", ops="ort")
