"""Infers the dtype of a GGUF file's base checkpoint, and checks whether the file was made from a given checkpoint."""

from __future__ import annotations

from typing import Final

import numpy as np

from exporter.formats.gguf.quantisation.tensors import encode_rows
from exporter.patch import evidence
from exporter.patch.evidence import VocabRows, sample
from exporter.patch.gguf.vocab_tensors import EMBEDDING, vocab_tensors
from exporter.sources.gguf.split_files import GgufModel
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hub.locate import PREFIX
from exporter.tensors import FLOATS, Array

#: Metadata key in which ttexport's writer records the dtype of the rows.
ROWS_DTYPE_KEY: Final = f"{PREFIX}rows.dtype"

#: Number of norms and biases that are read to find the dtype. Norms and biases are small, and a few would be enough.
_NORMS: Final = 64


def prove_base(model: GgufModel, base: Checkpoint) -> str:
    """Prove that the GGUF ``model`` was made from the checkpoint ``base``, by comparing a digest or sample rows.

    Returns a description of the proof.
    """
    tensor, file = model.tensors[EMBEDDING], model.holder(EMBEDDING)

    def read(row: int) -> Array:
        return file.rows(EMBEDDING, row, row + 1)

    def encode(row: Array) -> Array:
        return np.ascontiguousarray(encode_rows(row, tensor.type)).view(np.uint8)

    rows = VocabRows(model.path, EMBEDDING, tensor.type, tensor.shape, read, encode)
    return evidence.prove_base(model.path, model.metadata, base, rows)


def base_dtype(model: GgufModel) -> str:
    """Return the dtype of the base checkpoint: the recorded dtype, or a dtype inferred from unquantised values.

    GGUF files store norms and biases in float32, even if the other tensors are quantised. If the base checkpoint has a
    16-bit dtype, every stored float32 norm or bias is exactly representable in the 16-bit dtype. The function tests for
    bfloat16 before float16, because typical bfloat16 values are also exactly representable in float16. Raises
    UnreadableFile if the GGUF file contains no embedding.
    """
    recorded = model.metadata.get(ROWS_DTYPE_KEY)
    if recorded in FLOATS:
        return str(recorded)
    values = _unquantised(model)
    if not (values.view(np.uint32) & 0xFFFF).any():
        return "BF16"
    with np.errstate(over="ignore"):
        return "F16" if (values.astype(np.float16).astype(np.float32) == values).all() else "F32"


def _unquantised(model: GgufModel) -> Array:
    """Return values of norms and biases, and sample rows of an unquantised embedding, as one float32 array."""
    names = [
        name
        for name, tensor in model.tensors.items()
        if tensor.type == "F32" and len(tensor.shape) == 1 and name.endswith(("norm.weight", ".bias"))
    ][:_NORMS]
    values = [model.holder(name).dequantize_rows(name, 0, 1).reshape(-1) for name in names]
    if str(model.metadata.get("general.architecture", "")).startswith("gemma"):
        values = [norm - np.float32(1) for norm in values]  # the converter adds 1 to every norm
    embedding = model.tensors[vocab_tensors(model).embedding]
    if embedding.type in FLOATS:
        file = model.holder(EMBEDDING)
        values += [file.dequantize_rows(EMBEDDING, row, row + 1).reshape(-1) for row in sample(embedding.n_rows)]
    return np.concatenate(values) if values else np.empty(0, np.float32)
