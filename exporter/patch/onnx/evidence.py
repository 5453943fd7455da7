"""What a folder of ONNX models shows of the checkpoint that it was made from, and of a head that is the embedding."""

from __future__ import annotations

from typing import Final

import numpy as np

from exporter.errors import BadInput, TensorMismatch
from exporter.patch.onnx.matrix import Matrix
from exporter.patch.rows import sample
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.hub.locate import PREFIX
from exporter.sources.onnx.file import OnnxFile
from exporter.tensors import FLOATS, Array

DIGEST_KEY: Final = f"{PREFIX}base.embedding_sha256"

#: Rounding to 4 bits moves a row by about a tenth of its norm; the row of another matrix lies 1.4 norms away.
_SAME_WITHIN_NORMS: Final = 0.5


def prove_base(file: OnnxFile, embedding: Matrix, head: Matrix, base: Checkpoint) -> str:
    """How the model proved to be made from ``base``. Raises BadInput if it was not, or shows that it may not have been.

    A digest that the writer recorded decides; else rows of both matrices, spread over the vocabulary, are stored again
    from the base and must be the model's, byte for byte.
    """
    if (recorded := file.metadata.get(DIGEST_KEY)) is not None:
        if recorded != base.embedding_digest:
            raise BadInput(
                f"{file.path}: {DIGEST_KEY}: expected that of {base.path} ({base.embedding_digest[:12]}), "
                f"found {recorded[:12]:.80}: the model was made from another base"
            )
        return "recorded digest"
    tie = base.tie
    source = tie.embedding if tie.tied or tie.head is None else tie.head
    count = _compare(embedding, base, base.tensors[tie.embedding])
    if head.name != embedding.name:
        count += _compare(head, base, base.tensors[source])
    return f"{count} rows encoded again"


def _compare(matrix: Matrix, base: Checkpoint, stored: FileTensor) -> int:
    """How many rows were compared."""
    shape = (matrix.n_tokens, matrix.hidden)
    if stored.spec.shape != shape or stored.spec.dtype not in FLOATS:
        found = f"{stored.spec.dtype} {stored.spec.shape} in {base.path}"
        raise TensorMismatch(matrix.file.path, matrix.name, expected=f"a base of shape {shape}", found=found)
    ids = sample(matrix.n_tokens)
    for row in ids:
        want = np.concatenate(matrix.encode(stored.rows(row, row + 1)), axis=1)
        if not np.array_equal(want, matrix.stored(row)):
            raise BadInput(
                f"{matrix.file.path}: {matrix.name}: expected row {row} of {base.path} in {matrix.kind}, found "
                "another row: another base, or another quantiser (--trust-base goes on without this proof)"
            )
    return len(ids)


def recorded_provenance(file: OnnxFile) -> dict[str, str]:
    """What the model says of its making, without the prefix of our entries; {} in one of another tool."""
    return {key.removeprefix(PREFIX): value for key, value in file.metadata.items() if key.startswith(PREFIX)}


def repeats(embedding: Matrix, head: Matrix, *, tied: object) -> bool:
    """Whether the head is the embedding stored once more, as many tools write tied models. tied: what the config says.

    A config that unties them is believed; else the values decide, which may be rounded differently.
    """
    if tied is False or (embedding.n_tokens, embedding.hidden) != (head.n_tokens, head.hidden):
        return False
    return all(_near(embedding.values(row), head.values(row)) for row in sample(embedding.n_tokens))


def _near(one: Array, other: Array) -> bool:
    norm = max(float(np.linalg.norm(one)), float(np.linalg.norm(other)))
    return float(np.linalg.norm(one - other)) <= _SAME_WITHIN_NORMS * norm
