"""Evidence in a GGUF about the checkpoint that it was made from: its dtype, and whether it is a given checkpoint."""

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

#: Metadata key of our own writer.
ROWS_DTYPE_KEY: Final = f"{PREFIX}rows.dtype"

#: Norms and biases that are read for their precision; they are small, and a few would do.
_NORMS: Final = 64


def prove_base(model: GgufModel, base: Checkpoint) -> str:
    """Compare the embedding with that of ``base``, as ``evidence.prove_base`` does; returns the kind of proof."""
    tensor, file = model.tensors[EMBEDDING], model.holder(EMBEDDING)

    def read(row: int) -> Array:
        return file.rows(EMBEDDING, row, row + 1)

    def encode(row: Array) -> Array:
        return np.ascontiguousarray(encode_rows(row, tensor.type)).view(np.uint8)

    rows = VocabRows(model.path, EMBEDDING, tensor.type, tensor.shape, read, encode)
    return evidence.prove_base(model.path, model.metadata, base, rows)


def base_dtype(model: GgufModel) -> str:
    """The dtype in which the base stores its weights: as recorded, else as unquantised values of the file show it.

    GGUF keeps norms and biases in float32 whatever the type of the file, so the bits that a 16-bit dtype lacks are all
    zero. A value that fits bfloat16 also fits float16, except for its range, so the coarser bfloat16 is tried first.
    Raises what ``vocab_tensors`` raises, for a file that holds no model.
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
    """Norms, biases, and rows of an unquantised embedding, in float32."""
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
