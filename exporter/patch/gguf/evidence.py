"""What a GGUF shows of the checkpoint that it was made from: its dtype, and whether it is a given one."""

from __future__ import annotations

from typing import Final

import numpy as np

from exporter.errors import BadInput, TensorMismatch
from exporter.formats.gguf.quantisation.tensors import encode_rows
from exporter.patch.gguf.rows import EMBEDDING, matrices
from exporter.patch.rows import sample
from exporter.sources.gguf.split_files import GgufModel
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hub.locate import PREFIX
from exporter.tensors import FLOATS, Array

#: Keys of our own writer.
DIGEST_KEY: Final = f"{PREFIX}base.embedding_sha256"
ROWS_DTYPE_KEY: Final = f"{PREFIX}rows.dtype"

#: So many norms and biases are read for their precision; they are small, and a few would do.
_NORMS: Final = 64


def prove_base(parts: GgufModel, base: Checkpoint) -> str:
    """How the file proved to be made from ``base``. Raises BadInput if it was not, or shows that it may not have been.

    A digest that the writer recorded decides; else rows of the embedding, spread over the vocabulary, are encoded
    again from the base and must be the file's, byte for byte.
    """
    recorded = parts.metadata.get(DIGEST_KEY)
    if isinstance(recorded, str):
        if recorded != base.embedding_digest:
            raise BadInput(
                f"{parts.path}: {DIGEST_KEY}: expected that of {base.path} ({base.embedding_digest[:12]}), "
                f"found {recorded[:12]}: the file was made from another base"
            )
        return "recorded digest"
    tensor, stored = parts.tensors[EMBEDDING], base.tensors[base.tie.embedding]
    if tensor.shape != stored.spec.shape or stored.spec.dtype not in FLOATS:
        found = f"{stored.spec.dtype} {stored.spec.shape} in {base.path}"
        raise TensorMismatch(parts.path, EMBEDDING, expected=f"a base of shape {tensor.shape}", found=found)
    file, ids = parts.holder(EMBEDDING), sample(tensor.n_rows)
    for row in ids:
        want = encode_rows(stored.rows(row, row + 1), tensor.type)
        if not np.array_equal(np.ascontiguousarray(want).view(np.uint8), file.rows(EMBEDDING, row, row + 1)):
            raise BadInput(
                f"{parts.path}: {EMBEDDING}: expected row {row} of {base.path} in {tensor.type}, found another; "
                "another base, or another build of the quantiser (--trust-base goes on without this proof)"
            )
    return f"{len(ids)} rows encoded again"


def recorded_provenance(parts: GgufModel) -> dict[str, str]:
    """What the file says of its making, without the prefix of our keys; {} in a file of another tool."""
    return {
        name.removeprefix(PREFIX): value
        for name, value in parts.metadata.items()
        if name.startswith(PREFIX) and isinstance(value, str)
    }


def base_dtype(parts: GgufModel) -> str:
    """The dtype in which the base stores its weights: as recorded, else as unquantised values of the file show it.

    GGUF keeps norms and biases in float32 whatever the type of the file, so the bits that a 16-bit dtype lacks are all
    zero. What fits bfloat16 fits float16 as well, the range apart, so the coarser one is asked first.
    Raises what ``rows.matrices`` raises, for a file that holds no model.
    """
    recorded = parts.metadata.get(ROWS_DTYPE_KEY)
    if recorded in FLOATS:
        return str(recorded)
    values = _unquantised(parts)
    if not (values.view(np.uint32) & 0xFFFF).any():
        return "BF16"
    with np.errstate(over="ignore"):
        return "F16" if (values.astype(np.float16).astype(np.float32) == values).all() else "F32"


def _unquantised(parts: GgufModel) -> Array:
    """Norms, biases, and rows of an unquantised embedding, in float32."""
    names = [
        name
        for name, tensor in parts.tensors.items()
        if tensor.type == "F32" and len(tensor.shape) == 1 and name.endswith(("norm.weight", ".bias"))
    ][:_NORMS]
    values = [parts.holder(name).dequantize_rows(name, 0, 1).reshape(-1) for name in names]
    if str(parts.metadata.get("general.architecture", "")).startswith("gemma"):
        values = [one - np.float32(1) for one in values]  # the converter adds it to every norm
    embedding = parts.tensors[matrices(parts).embedding]
    if embedding.type in FLOATS:
        file = parts.holder(EMBEDDING)
        values += [file.dequantize_rows(EMBEDDING, row, row + 1).reshape(-1) for row in sample(embedding.n_rows)]
    return np.concatenate(values) if values else np.empty(0, np.float32)
