"""Check the rows, the number of rows and the tying of embedding and head, without running a model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from exporter.tensors import BLOCK_BYTES, DTYPES, FLOATS, Array, cast
from exporter.verify.expect.expected import Expected
from exporter.verify.expect.reference import Reference
from exporter.verify.report import Check
from exporter.verify.stored.artifact import Artifact, StoredMatrix, encode
from exporter.verify.values.computed import check_computed


def check_rows(artifact: Artifact, reference: Reference, *, untouched: bool) -> Iterator[Check]:
    """Yield the checks of rows in the embedding and the head.

    untouched: True to compare every untrained row in addition to the trained rows.

    Peak memory: the size of one block of rows. The run time is proportional to the number of trained rows or, if
    ``untouched`` is True, to the size of embedding and head.
    """
    yield _check_size("embedding", artifact.embedding, reference.vocab)
    yield _check_tie(artifact, reference)
    uses = [("embedding", artifact.embedding, reference.embedding)]
    if artifact.encoder_embedding is not None:
        yield _check_size("encoder embedding", artifact.encoder_embedding, reference.vocab)
        uses.append(("encoder embedding", artifact.encoder_embedding, reference.embedding))
    if artifact.head is not None:
        # If the base is tied, the artifact's head must also contain the trained rows, even if stored separately.
        uses.append(("head", artifact.head, reference.embedding if reference.tied else reference.head))
    for use, matrix, want in uses:
        if matrix.n_rows != reference.vocab:
            continue  # the size check has failed, and rows cannot be matched with token ids
        if want.computed:
            yield check_computed(use, matrix, want, every=untouched)
            continue
        yield _check_trained(use, matrix, want)
        if untouched:
            yield _check_untouched(use, matrix, want)


def _check_size(use: str, matrix: StoredMatrix, vocab: int) -> Check:
    passed = matrix.n_rows == vocab
    detail = (
        f"{matrix.name} has {vocab} rows" if passed else f"{matrix.name}: expected {vocab} rows, found {matrix.n_rows}"
    )
    return Check(name=f"{use} size", passed=passed, detail=detail)


def _check_tie(artifact: Artifact, reference: Reference) -> Check:
    """Check that a tied model stores one tensor for embedding and head, and an untied model stores two tensors.

    A tied checkpoint may store the embedding a second time as head if the base checkpoint also stores both.
    """
    stored = "one tensor" if artifact.head is None else f"{artifact.embedding.name} and {artifact.head.name}"
    if reference.tied:
        duplicate = artifact.format == "hf" and reference.checkpoint.tie.head is not None
        passed, expected = artifact.head is None or duplicate, "one tensor for embedding and head"
    else:
        passed, expected = artifact.head is not None, "separate tensors for embedding and head"
    return Check(name="tie", passed=passed, detail=stored if passed else f"expected {expected}, found {stored}")


def _check_trained(use: str, matrix: StoredMatrix, want: Expected) -> Check:
    """Check that every trained row in the artifact equals the adapter's row rounded to the artifact's storage type."""
    rows, base_dtype = want.rows, want.base.spec.dtype
    wrong = [
        token_id
        for token_id, row in rows.items()
        if not any(
            np.array_equal(matrix.raw(token_id, token_id + 1), encoding)
            for encoding in _encodings(row, matrix, base_dtype)
        )
    ]
    detail = f"{len(rows)} trained rows equal the adapter's rows, encoded in {matrix.storage}"
    if wrong:
        detail = (
            f"{matrix.name}: {len(wrong)} of {len(rows)} trained rows differ from the adapter; "
            f"the first is the row of token {wrong[0]}"
        )
    return Check(name=f"{use} rows", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _encodings(row: Array, matrix: StoredMatrix, base_dtype: str) -> Iterator[Array]:
    """Yield the stored bytes of ``row``, a trained row, for each accepted way to round and encode a row.

    A trained row may be encoded directly from the adapter's dtype, or rounded to the base model's dtype and then
    encoded. A quantised row may also be encoded after rounding to F16 or BF16, regardless of the base model's dtype.
    """
    yield encode(row[None], matrix.storage)
    for dtype in (base_dtype,) if matrix.storage in FLOATS else (base_dtype, "F16", "BF16"):
        if dtype in FLOATS:
            yield encode(cast(row[None], dtype), matrix.storage)


def rounded_before(artifact: Artifact, reference: Reference) -> str | None:
    """Return the 16-bit dtype to which a float32 artifact's trained rows were rounded, or None if not rounded.

    Trained rows are rounded if an export tool merges into a 16-bit checkpoint and then converts the result to float32.
    """
    want, matrix = reference.embedding, artifact.embedding
    dtype = want.base.spec.dtype
    if matrix.storage != "F32" or dtype not in ("F16", "BF16") or want.computed or matrix.n_rows != reference.vocab:
        return None
    through = False
    for token_id, row in want.rows.items():
        raw = matrix.raw(token_id, token_id + 1)
        if not np.array_equal(raw, encode(row[None], "F32")):
            through = True
            if not np.array_equal(raw, encode(cast(row[None], dtype), "F32")):
                return None
    return dtype if through else None


def _check_untouched(use: str, matrix: StoredMatrix, want: Expected) -> Check:
    """Check that every untrained row equals the base's row or, if an adapter replaces the matrix, the adapter's row."""
    spec, rows = want.source.spec, want.rows
    count = spec.n_rows if want.kept is None else min(want.kept, spec.n_rows)
    base_dtype = want.base.spec.dtype
    step = max(1, BLOCK_BYTES // max(1, spec.row_nbytes))
    wrong: list[int] = []
    for start in range(0, count, step):
        stop = min(start + step, count)
        block = want.source.rows(start, stop)
        raw = matrix.raw(start, stop)
        differs = np.all(
            [(encoding != raw).any(axis=1) for encoding in _block_encodings(block, matrix, base_dtype)], axis=0
        )
        wrong += [start + int(row) for row in np.flatnonzero(differs) if start + int(row) not in rows]
    untrained = count - sum(token_id < count for token_id in rows)
    detail = f"{untrained} untrained rows equal the rows of the base"
    if wrong:
        detail = (
            f"{matrix.name}: {len(wrong)} of {untrained} untrained rows differ from the base; "
            f"the first is the row of token {wrong[0]}"
        )
    return Check(name=f"{use} untouched", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _block_encodings(block: Array, matrix: StoredMatrix, base_dtype: str) -> Iterator[Array]:
    yield encode(block, matrix.storage)
    if block.dtype != DTYPES[base_dtype]:
        yield encode(cast(block, base_dtype), matrix.storage)
