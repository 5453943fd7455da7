"""Proves that an artifact was made from a checkpoint, by comparing a recorded digest or re-encoded sample rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporter.errors import BadInput, TensorMismatch
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.hub.locate import PREFIX
from exporter.tensors import FLOATS, Array

#: Metadata key in which ttexport records the digest of the checkpoint's embedding.
DIGEST_KEY: Final = f"{PREFIX}base.embedding_sha256"

#: Number of rows to compare if a comparison of all rows would take too long.
_SAMPLED: Final = 32


@dataclass(frozen=True)
class VocabRows:
    """Access to the rows of one vocabulary matrix of an artifact.

    shape: (number of tokens, hidden size). storage: description of the dtype or quantisation. read: function that maps
    a row number to the stored bytes of the row, as a uint8 array (1, bytes). encode: function that maps a checkpoint
    row (1, hidden) to the bytes that the artifact would store for the row, as a uint8 array (1, bytes).
    """

    path: Path
    name: str
    storage: str
    shape: tuple[int, ...]
    read: Callable[[int], Array]
    encode: Callable[[Array], Array]


def prove_base(
    path: Path, metadata: Mapping[str, Any], base: Checkpoint, embedding: VocabRows, head: VocabRows | None = None
) -> str:
    """Prove that the model at ``path`` was made from the checkpoint ``base``. Returns a description of the proof.

    If the artifact contains a digest of its checkpoint, only the digest is compared. If the artifact contains no
    digest, a sample of the checkpoint's rows is encoded again, and the encoded rows must equal the stored rows byte for
    byte. head: rows of the LM head, or None to compare only the embedding. Raises BadInput if a digest or a row
    differs, and TensorMismatch if the shape of a matrix differs.
    """
    recorded = metadata.get(DIGEST_KEY)
    if isinstance(recorded, str):
        if recorded != base.embedding_digest:
            raise BadInput(
                f"{path}: {DIGEST_KEY}: expected {base.embedding_digest[:12]}, the digest of {base.path}, "
                f"found {recorded[:12]:.80}; the model was made from a different base",
                path=path,
            )
        return "recorded digest"
    tie = base.tie
    count = _compare(embedding, base, base.tensors[tie.embedding])
    if head is not None:
        source = tie.embedding if tie.tied or tie.head is None else tie.head
        count += _compare(head, base, base.tensors[source])
    return f"{count} rows of the checkpoint encoded again and equal to the stored rows"


def recorded_provenance(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the entries of ``metadata`` that ttexport wrote, with the prefix ``ttexport.`` removed from the keys."""
    return {
        key.removeprefix(PREFIX): value
        for key, value in metadata.items()
        if key.startswith(PREFIX) and isinstance(value, str)
    }


def sample(n_rows: int, count: int = _SAMPLED) -> list[int]:
    """Return at most ``count`` evenly spaced, ascending row numbers from ``range(n_rows)``."""
    return sorted({round(step * (n_rows - 1) / max(1, count - 1)) for step in range(count)})


def _compare(matrix: VocabRows, base: Checkpoint, stored: FileTensor) -> int:
    """Compare sample rows of ``matrix`` with the checkpoint's tensor ``stored``.

    Returns the number of compared rows.
    """
    if stored.spec.shape != matrix.shape or stored.spec.dtype not in FLOATS:
        actual = f"{stored.spec.dtype} {stored.spec.shape} in {base.path}"
        raise TensorMismatch(
            matrix.path,
            matrix.name,
            expected=f"a floating-point matrix of shape {matrix.shape} in the base",
            found=actual,
        )
    rows = sample(matrix.shape[0])
    for row in rows:
        if not np.array_equal(matrix.encode(stored.rows(row, row + 1)), matrix.read(row)):
            raise BadInput(
                f"{matrix.path}: {matrix.name}: expected row {row} of {base.path} encoded as {matrix.storage}, "
                "found different bytes; the model was made from a different base or by a different build of the "
                "quantiser; use --trust-base to skip the comparison with the base",
                path=matrix.path,
            )
    return len(rows)
