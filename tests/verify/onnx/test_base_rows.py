"""Tensors that a tool packed are still compared with the base, number by number."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exporter.tensors import cast, read
from exporter.verify.expect.reference import Reference
from exporter.verify.onnx.base_rows import BaseRows
from fixtures.models import families


def test_biases_of_queries_keys_and_values_are_known_in_one_vector(tmp_path: Path) -> None:
    reference = Reference.open(families.build("qwen2", tmp_path / "base"), [])
    base = BaseRows(reference)
    names = [f"model.layers.1.self_attn.{part}_proj.bias" for part in "qkv"]
    packed = np.concatenate([cast(read(reference.tensors[name].source), "F32") for name in names])
    assert base.vector_fault("layers.1.self_attn.qkv_proj.bias", packed) == ""
    packed[-1] = np.nextafter(packed[-1], np.float32(np.inf))
    assert (
        base.vector_fault("layers.1.self_attn.qkv_proj.bias", packed)
        == "the 1-D tensor is close to a 1-D tensor of the base, but some elements differ"
    )
