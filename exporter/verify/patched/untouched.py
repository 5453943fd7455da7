"""Compute, before a patch, digests of the rows and bytes that the patch must not change.

An in-place patch overwrites the base, so after the patch only digests of the base are available for the comparison.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from exporter.tensors import BLOCK_BYTES, Array
from exporter.verify.report import Check
from exporter.verify.values.computed import SAMPLED, sample

#: Function ``read(start, stop)`` that returns the stored rows [start, stop) of a tensor, (n, bytes) uint8.
Reader = Callable[[int, int], Array]
#: Range (start, stop) of rows → SHA-256 digest of the bytes of the unchanged rows in the range.
Digests = Mapping[tuple[int, int], bytes]


def sampled_rows(n_rows: int, changed: Collection[int]) -> list[tuple[int, int]]:
    """Return ranges of one row each, for a sample of the rows that the patch must not change.

    The sample includes the rows next to changed rows, because a patch that writes at a wrong offset overwrites
    neighbouring rows.
    """
    near = {row + step for row in sorted(changed)[:SAMPLED] for step in (-1, 1)}
    rows = (near | set(sample(n_rows))) - set(changed)
    return [(row, row + 1) for row in sorted(rows) if 0 <= row < n_rows]


def all_rows(n_rows: int, row_nbytes: int) -> list[tuple[int, int]]:
    """Return ranges that cover all rows of a matrix. A range has at most 8 MiB, or one row if a row exceeds 8 MiB."""
    step = max(1, BLOCK_BYTES // max(1, row_nbytes))
    return [(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def digests(
    read: Reader, ranges: Iterable[tuple[int, int]], changed: Collection[int] = ()
) -> dict[tuple[int, int], bytes]:
    """Return the digest of each range of rows in ``ranges``, computed without the rows ``changed``.

    Peak memory: the bytes of one range.
    """
    ids = np.array(sorted(changed), np.int64)
    return {
        (start, stop): _digest(read(start, stop), ids[(ids >= start) & (ids < stop)] - start) for start, stop in ranges
    }


def differing(read: Reader, before: Digests, changed: Collection[int] = ()) -> list[tuple[int, int]]:
    """Return all ranges of rows for which the digest after the patch differs from the digest in ``before``."""
    after = digests(read, before, changed)
    return [rows for rows, digest in before.items() if after[rows] != digest]


def check_untouched(wrong: Sequence[str], description: str) -> Check:
    """Return a check that fails if the patch changed an untrained row or any other byte that must not change.

    wrong: descriptions of the ranges with different digests; the check passes if ``wrong`` is empty. description: the
    check's detail text if the check passes.
    """
    detail = f"{wrong[0]}: expected the content of the base, found different content" if wrong else description
    return Check(name="untouched", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def describe_range(unit: str, start: int, stop: int) -> str:
    """Return a description of a range of rows or bytes, such as ``row 7`` or ``rows 0 to 4095``."""
    return f"{unit} {start}" if stop == start + 1 else f"{unit}s {start} to {stop - 1}"


def _digest(rows: Array, without: Array) -> bytes:
    if len(without):
        rows = np.delete(rows, without, axis=0)
    return hashlib.sha256(np.ascontiguousarray(rows).data).digest()
