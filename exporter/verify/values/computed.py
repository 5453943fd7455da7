"""Compare stored sums of base weights and low-rank updates with sums that the verification computes in float64."""

from __future__ import annotations

from typing import Final

import numpy as np

from exporter.tensors import DTYPES, Array, cast
from exporter.verify.expect.expected import Expected
from exporter.verify.report import Check
from exporter.verify.stored.artifact import StoredMatrix
from exporter.verify.tolerances import MERGED_F32_NOISE, MERGED_ULPS
from exporter.verify.values.quantised_rows import sum_fault

#: Number of rows per updated tensor in a sample: the first row, the last row, and four rows in between.
SAMPLED: Final = 6
_ROWS_AT_ONCE: Final = 512
_MANTISSA_BITS: Final = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}


def check_computed(use: str, matrix: StoredMatrix, want: Expected, *, every: bool) -> Check:
    """Compare rows of ``matrix`` with the expected sums of base and updates.

    every: True to compare every row, False to compare a sample of the rows.
    """
    if matrix.storage not in _MANTISSA_BITS:
        return _check_quantised(use, matrix, want, every=every)
    ids = range(want.n_rows) if every else sample(want.n_rows)
    wrong, worst = compare(matrix, want, ids)
    detail = f"compared {len(ids)} of {want.n_rows} rows with base plus adapter updates"
    if wrong:
        detail = (
            f"{matrix.name}: {len(wrong)} of {len(ids)} rows differ from base plus adapter updates; "
            f"the first is row {wrong[0]}"
        )
    return Check(name=f"{use} updates", passed=not wrong, value=worst, limit=MERGED_ULPS, detail=detail)


def _check_quantised(use: str, matrix: StoredMatrix, want: Expected, *, every: bool) -> Check:
    """Compare a quantised matrix with the expected sums of base and updates, block by block.

    A block contains many rows, so that an update is detected even if it is smaller than the quantisation error of a
    single row.

    every: True to compare all blocks, False to compare only the first block.
    """
    known = min(want.n_rows, want.base.spec.n_rows)
    starts = range(0, known if every else min(known, _ROWS_AT_ONCE), _ROWS_AT_ONCE)
    unseen = 0
    for start in starts:
        ids = range(start, min(start + _ROWS_AT_ONCE, known))
        raw, base = matrix.raw(start, ids.stop), cast(want.base.rows(start, ids.stop), "F64")
        fault = sum_fault(raw, want.values(ids), base, matrix.storage, want.base.spec.dtype)
        if fault:
            detail = f"{matrix.name}: block that starts at row {start}: {fault}"
            return Check(name=f"{use} updates", passed=False, detail=detail)
        unseen += fault is None
    count = min(known, len(starts) * _ROWS_AT_ONCE)
    detail = f"compared {count} of {want.n_rows} rows in {matrix.storage} with base plus adapter updates"
    if unseen:
        detail += (
            f"; in {unseen} of {len(starts)} blocks, the update is below the quantisation error "
            "and can be verified only by comparing the model's logits"
        )
    return Check(name=f"{use} updates", passed=True, detail=detail)


def sample(count: int) -> list[int]:
    """Return up to ``SAMPLED`` evenly spaced numbers from ``range(count)``, including the first and last number."""
    return sorted({round(step * (count - 1) / max(1, SAMPLED - 1)) for step in range(SAMPLED)})


def compare(matrix: StoredMatrix, want: Expected, ids: range | list[int]) -> tuple[list[int], float]:
    """Compare stored rows with the expected sums of base and updates.

    Returns a tuple (indices of the rows that differ, largest deviation of any element in ulps of the storage dtype).
    """
    wrong: list[int] = []
    worst = 0.0
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        some = list(ids[start : start + _ROWS_AT_ONCE])
        wide = want.values(some).reshape(len(some), -1)
        off = ulps(_stored(matrix, some).reshape(len(some), -1), wide, matrix.storage)
        worst = max(worst, float(off.max(initial=0.0)))
        wrong += [row for row, rows_off in zip(some, off, strict=True) if not (rows_off <= MERGED_ULPS).all()]
    return wrong, worst


def _stored(matrix: StoredMatrix, ids: list[int]) -> Array:
    if ids[-1] - ids[0] == len(ids) - 1:
        raw = matrix.raw(ids[0], ids[-1] + 1)
    else:
        raw = np.concatenate([matrix.raw(row, row + 1) for row in ids])
    return cast(np.ascontiguousarray(raw).view(DTYPES[matrix.storage]), "F64")


def ulps(stored: Array, want: Array, storage: str) -> Array:
    """Return the distance between each element of ``stored`` and of ``want``, in ulps of the dtype ``storage``.

    A fixed share of the row's largest value, which allows for rounding in float32 sums, is subtracted from each
    distance. ``storage`` is the dtype of the stored values. Inputs and result are float64 arrays of shape (rows,
    width).
    """
    noise = MERGED_F32_NOISE * np.abs(want).max(axis=1, keepdims=True)
    exponent = np.floor(np.log2(np.maximum(np.abs(want), np.finfo(np.float32).tiny)))
    unit = np.exp2(exponent - _MANTISSA_BITS[storage])
    distance: Array = np.maximum(np.abs(stored - want) - noise, 0.0) / unit
    distance[~np.isfinite(stored)] = np.inf
    return distance
