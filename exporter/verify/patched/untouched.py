"""Rows and bytes that a patch must leave as they are, as digests taken from the base before it.

Digests serve a patch in place, which leaves no base to compare with, and a copy alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

import numpy as np

from exporter.tensors import BLOCK_BYTES, Array
from exporter.verify.report import Check

#: Rows of a matrix, and spans of any other tensor, that are compared when not all bytes are.
_SAMPLED: Final = 6

#: ``read(start, stop)``: rows [start, stop) of a tensor as they are stored, (n, bytes) uint8.
Reader = Callable[[int, int], Array]
#: (start, stop) of rows → SHA-256 of their bytes, without the rows that change.
Digests = Mapping[tuple[int, int], bytes]


def spread(count: int) -> list[int]:
    """At most 6 of ``range(count)``, evenly spread, ascending."""
    return sorted({round(step * (count - 1) / (_SAMPLED - 1)) for step in range(_SAMPLED)})


def sampled_rows(n_rows: int, changed: Collection[int]) -> list[tuple[int, int]]:
    """Some rows that stay, one a range. Neighbours of changed rows come first: a wrong offset hits them."""
    near = {row + step for row in sorted(changed)[:_SAMPLED] for step in (-1, 1)}
    rows = (near | set(spread(n_rows))) - set(changed)
    return [(row, row + 1) for row in sorted(rows) if 0 <= row < n_rows]


def all_rows(n_rows: int, row_nbytes: int) -> list[tuple[int, int]]:
    """Every row, in ranges of at most 8 MiB, but of at least one row."""
    step = max(1, BLOCK_BYTES // max(1, row_nbytes))
    return [(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def digests(
    read: Reader, ranges: Iterable[tuple[int, int]], changed: Collection[int] = ()
) -> dict[tuple[int, int], bytes]:
    """The digest of every range, without the rows ``changed``. Memory: one range."""
    ids = np.array(sorted(changed), np.int64)
    return {
        (start, stop): _digest(read(start, stop), ids[(ids >= start) & (ids < stop)] - start) for start, stop in ranges
    }


def differing(read: Reader, before: Digests, changed: Collection[int] = ()) -> list[tuple[int, int]]:
    """The ranges whose bytes are no longer those of ``before``."""
    after = digests(read, before, changed)
    return [place for place, digest in before.items() if after[place] != digest]


def check_untouched(wrong: Sequence[str], compared: str) -> Check:
    """wrong: places whose bytes are not the base's. compared: what was compared, for a check that passes."""
    detail = f"{wrong[0]} differs from the base, and {len(wrong) - 1} more" if wrong else f"{compared} as in the base"
    return Check(name="untouched", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def place(unit: str, start: int, stop: int) -> str:
    """A range in words: ``row 7``, ``rows 0 to 4095``."""
    return f"{unit} {start}" if stop == start + 1 else f"{unit}s {start} to {stop - 1}"


def _digest(rows: Array, without: Array) -> bytes:
    if len(without):
        rows = np.delete(rows, without, axis=0)
    return hashlib.sha256(np.ascontiguousarray(rows).data).digest()
