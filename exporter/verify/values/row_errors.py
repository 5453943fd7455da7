"""Measure the storage error of every trained token row, relative to how much training changed the row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from exporter.tensors import FLOATS
from exporter.verify.expect.expected import Expected
from exporter.verify.expect.reference import Reference
from exporter.verify.findings import RowErrors
from exporter.verify.report import Check
from exporter.verify.stored.artifact import Artifact, StoredMatrix, decode
from exporter.verify.tolerances import ROW_ERROR_SHARE


def row_errors(artifact: Artifact, reference: Reference) -> list[RowErrors]:
    """Measure the storage errors of the trained rows in the embedding and the head.

    If a matrix has more or fewer rows than the vocabulary, the matrix is skipped, because its rows cannot be matched
    with token ids.
    """
    uses = [("embedding", artifact.embedding, reference.embedding)]
    if artifact.encoder_embedding is not None:
        uses.append(("encoder embedding", artifact.encoder_embedding, reference.embedding))
    if artifact.head is not None:
        uses.append(("head", artifact.head, reference.embedding if reference.tied else reference.head))
    return [_measure(use, matrix, want) for use, matrix, want in uses if want.rows and matrix.n_rows == reference.vocab]


def check_row_errors(measured: Sequence[RowErrors]) -> Iterator[Check]:
    """Check that the storage error of every quantised row is at most as large as the row's change by training.

    Rows that are stored as floats are not checked here, because a separate check compares float rows bit for bit.
    """
    for errors in measured:
        if errors.storage in FLOATS:
            continue
        shares = errors.shares()
        worst = int(np.argmax(shares))
        detail = (
            f"among {len(shares)} trained rows in {errors.storage}, "
            f"the row of token {errors.token_ids[worst]} has the largest ratio of error to change: "
            f"error {errors.errors[worst]:.3g}, change {errors.changes[worst]:.3g}"
        )
        yield Check.at_most(f"{errors.use} changes", shares[worst], ROW_ERROR_SHARE, detail)


def _measure(use: str, matrix: StoredMatrix, want: Expected) -> RowErrors:
    token_ids = sorted(want.rows)
    errors, changes = [], []
    for token_id in token_ids:
        new = want.values([token_id])[0]
        known = token_id < want.base.spec.n_rows
        base = want.base.rows(token_id, token_id + 1)[0].astype(np.float64) if known else np.zeros_like(new)
        stored = decode(matrix.raw(token_id, token_id + 1), matrix.storage)[0]
        errors.append(float(np.linalg.norm(stored - new)))
        changes.append(float(np.linalg.norm(new - base)))
    return RowErrors(use, matrix.storage, token_ids, errors, changes)
