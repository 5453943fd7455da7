"""Evidence that a base artifact was made from a given checkpoint: a recorded digest, or rows that are encoded again."""

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

#: Metadata key of our own writers: the digest of the embedding of the checkpoint.
DIGEST_KEY: Final = f"{PREFIX}base.embedding_sha256"

#: Rows that are compared where comparing all would take too long.
_SAMPLED: Final = 32


@dataclass(frozen=True)
class VocabRows:
    """Rows of one vocabulary matrix of an artifact. shape: (tokens, hidden). storage: dtype or quantisation, in words.

    read: row number → its bytes, (1, n) uint8. encode: a row (1, hidden) of the checkpoint → the bytes that the
    artifact would store, (1, n) uint8.
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
    """Prove that the model at ``path`` was made from ``base``; returns the kind of proof, in words.

    A digest that the writer recorded decides. Without one, rows spread over the vocabulary are encoded again from the
    checkpoint, and must equal the stored rows byte for byte. head: None if the embedding alone is compared.
    Raises BadInput, TensorMismatch if the model was made from another base, or if that cannot be excluded.
    """
    recorded = metadata.get(DIGEST_KEY)
    if isinstance(recorded, str):
        if recorded != base.embedding_digest:
            raise BadInput(
                f"{path}: {DIGEST_KEY}: expected that of {base.path} ({base.embedding_digest[:12]}), "
                f"found {recorded[:12]:.80}: the model was made from another base",
                path=path,
            )
        return "recorded digest"
    tie = base.tie
    count = _compare(embedding, base, base.tensors[tie.embedding])
    if head is not None:
        source = tie.embedding if tie.tied or tie.head is None else tie.head
        count += _compare(head, base, base.tensors[source])
    return f"{count} rows encoded again"


def recorded_provenance(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The provenance that ttexport recorded in a model's metadata, without the prefix of its keys; else {}."""
    return {
        key.removeprefix(PREFIX): value
        for key, value in metadata.items()
        if key.startswith(PREFIX) and isinstance(value, str)
    }


def sample(n_rows: int, count: int = _SAMPLED) -> list[int]:
    """At most ``count`` of ``range(n_rows)``, evenly spread, ascending."""
    return sorted({round(step * (n_rows - 1) / max(1, count - 1)) for step in range(count)})


def _compare(matrix: VocabRows, base: Checkpoint, stored: FileTensor) -> int:
    """Compare sampled rows; returns their number."""
    if stored.spec.shape != matrix.shape or stored.spec.dtype not in FLOATS:
        actual = f"{stored.spec.dtype} {stored.spec.shape} in {base.path}"
        raise TensorMismatch(matrix.path, matrix.name, expected=f"a base of shape {matrix.shape}", found=actual)
    rows = sample(matrix.shape[0])
    for row in rows:
        if not np.array_equal(matrix.encode(stored.rows(row, row + 1)), matrix.read(row)):
            raise BadInput(
                f"{matrix.path}: {matrix.name}: expected row {row} of {base.path} in {matrix.storage}, found another "
                "row: another base, or another build of the quantiser (--trust-base skips this proof)",
                path=matrix.path,
            )
    return len(rows)
