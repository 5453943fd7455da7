"""Small ONNX models made by the onnx package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from exporter.tensors import Array

VOCAB, HIDDEN = 6, 4
TABLE: Array = np.arange(VOCAB * HIDDEN, dtype=np.float32).reshape(VOCAB, HIDDEN)
HEAD: Array = -TABLE


def save(path: Path, nodes: Sequence[NodeProto], tensors: Sequence[TensorProto], outputs: Sequence[str] = ()) -> Path:
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs or ("logits",)]
    graph = helper.make_graph(list(nodes), "graph", inputs, made, list(tensors))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    return path


def tensor(name: str, value: Array) -> TensorProto:
    return numpy_helper.from_array(value, name)
