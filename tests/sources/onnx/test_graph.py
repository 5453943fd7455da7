"""Embedding and head are found in the graphs of any tool by their structure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper

from exporter.sources.onnx.file import OnnxFile
from tests.sources.onnx.onnx_models import HIDDEN, VOCAB, save, tensor


def node(op_type: str, inputs: str, output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], **attributes)


GRAPHS: dict[str, tuple[list[NodeProto], dict[str, tuple[int, ...]], tuple[str, int, str, int]]] = {
    "one matrix for both, Gemm": (
        [node("Gather", "w input_ids", "x"), node("Gemm", "x w", "y", transB=1), node("Reshape", "y s", "logits")],
        {"w": (VOCAB, HIDDEN), "s": (3,)},
        ("w", 0, "w", 0),
    ),
    "one matrix for both, stored for the head": (
        [node("Transpose", "w", "t", perm=[1, 0]), node("Gather", "t input_ids", "x"), node("MatMul", "x w", "logits")],
        {"w": (HIDDEN, VOCAB)},
        ("w", 1, "w", 1),
    ),
    "transpose in front of the head": (
        [node("Gather", "w input_ids", "x"), node("Transpose", "w", "t"), node("MatMul", "x t", "logits")],
        {"w": (VOCAB, HIDDEN)},
        ("w", 0, "w", 0),
    ),
    "matrix first": (
        [
            node("Gather", "e input_ids", "x"),
            node("Gemm", "h x", "c", transB=1),
            node("Transpose", "c", "logits", perm=[1, 0]),
        ],
        {"e": (VOCAB, HIDDEN), "h": (VOCAB, HIDDEN)},
        ("e", 0, "h", 0),
    ),
    "half precision, bias, cap and scale": (
        [
            node("Cast", "input_ids", "ids", to=TensorProto.INT32),
            node("Cast", "e", "e32", to=TensorProto.FLOAT),
            node("Gather", "e32 ids", "x"),
            node("MatMul", "x h", "a"),
            node("Add", "bias a", "b"),
            node("Div", "b cap", "c"),
            node("Tanh", "c", "d"),
            node("Mul", "d cap", "logits"),
        ],
        {"e": (VOCAB, HIDDEN), "h": (HIDDEN, VOCAB), "bias": (VOCAB,), "cap": ()},
        ("e", 0, "h", 1),
    ),
    "other look-ups are no embedding": (
        [
            node("Gather", "positions other", "p"),
            node("Gather", "e input_ids", "x"),
            node("Identity", "x", "y"),
            node("Gemm", "y h", "logits"),
        ],
        {"positions": (9, HIDDEN), "other": (1, 3), "e": (VOCAB, HIDDEN), "h": (HIDDEN, VOCAB)},
        ("e", 0, "h", 1),
    ),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_embedding_and_head_are_found_by_the_structure(tmp_path: Path, case: str) -> None:
    nodes, shapes, (embedding, embedding_axis, head, head_axis) = GRAPHS[case]
    tensors = [tensor(name, np.zeros(shape, np.float32)) for name, shape in shapes.items()]
    file = OnnxFile.open(save(tmp_path / "model.onnx", nodes, tensors))
    assert (file.embedding, file.head) == (embedding, head)
    assert (file.token_axis[embedding], file.token_axis[head]) == (embedding_axis, head_axis)


def test_graph_without_vocabulary_has_neither(tmp_path: Path) -> None:
    nodes = [node("Add", "pixels pixels", "logits")]
    file = OnnxFile.open(save(tmp_path / "model.onnx", nodes, []))
    assert (file.embedding, file.head) == (None, None)


def test_circular_graph_does_not_hang(tmp_path: Path) -> None:
    nodes = [
        node("Identity", "b", "a"),
        node("Identity", "a", "b"),
        node("Gather", "a b", "x"),
        node("Add", "logits x", "y"),
        node("Mul", "y y", "logits"),
    ]
    file = OnnxFile.open(save(tmp_path / "model.onnx", nodes, []))
    assert (file.embedding, file.head) == (None, None)
