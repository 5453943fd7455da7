"""Compare rows of quantised tensors with their expected values: same bytes, or an error that fits their type.

A quantiser with an importance matrix, or of another build, makes other bytes everywhere: the error of its rows may be
that of rows quantised here times a factor. For sums of base and updates, few rows have the same bytes even from the
same quantiser, and an update may be smaller than the error: it must show in the sum over the whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from exporter.errors import MissingDependency, NotExpressible
from exporter.tensors import FLOATS, Array, cast
from exporter.verify.stored.artifact import decode, encode
from exporter.verify.stored.onnx_blocks import BlockStorage
from exporter.verify.tolerances import (
    QUANTISED_ERROR,
    QUANTISED_ERROR_MEDIAN,
    QUANTISED_ERROR_PLAIN,
    QUANTISED_IDENTICAL,
    UPDATE_ERRORS,
    UPDATE_SHARE,
)

#: A quantisation may be made from a 16-bit file, whatever the dtype of the base.
_THROUGH: Final = ("F16", "BF16")
#: Types that quantisers encode independently of an importance matrix.
_PLAIN: Final = frozenset({"Q8_0", "TQ1_0", "TQ2_0", "MXFP4"})


@dataclass
class QuantisedRows:
    """Rows of one quantised tensor, compared with the same rows quantised here.

    identical: rows with the same bytes.  others: (row, error as a multiple of that of the row quantised here).
    not_made: whether some rows could not be quantised here.
    """

    storage: str
    identical: int = 0
    not_made: bool = False
    others: list[tuple[int, float]] = field(default_factory=list)

    def add(self, raw: Array, value: Array, base_dtype: str, first: int) -> None:
        """Compare stored rows with ``value``.

        raw: (n, bytes), rows from ``first`` on, as stored.  value: (n, width).  base_dtype: dtype of the base's tensor.
        """
        try:
            made = encode(value, self.storage)
        except (MissingDependency, NotExpressible):
            self.not_made = True
            return
        differs = (made != raw).any(axis=1)
        for dtype in dict.fromkeys((base_dtype, *_THROUGH)):
            if differs.any() and dtype in FLOATS:
                differs[differs] = (encode(cast(value[differs], dtype), self.storage) != raw[differs]).any(axis=1)
        self.identical += int((~differs).sum())
        if differs.any():
            wide = value[differs].astype(np.float64)
            shares = _shares(raw[differs], made[differs], wide, self.storage)
            self.others += [
                (first + int(row), float(share)) for row, share in zip(np.flatnonzero(differs), shares, strict=True)
            ]

    def faults(self) -> Iterator[str]:
        """Faults: rows that differ where most rows have the same bytes, or rows with too large an error."""
        if self.others and self.identical >= QUANTISED_IDENTICAL * (self.identical + len(self.others)):
            yield f"row {self.others[0][0]} is not quantised in the same way as {self.identical} others"
            return
        yield from too_far(self.others, self.storage, "the base")


def too_far(rows: list[tuple[int, float]], storage: str, target: str) -> Iterator[str]:
    """The first row with too large an error for its type, else a fault of the tensor if half of its rows have one.

    rows: (row, its error as a multiple of that of the row quantised here).  target: the expected values, for messages.
    """
    limit = QUANTISED_ERROR_PLAIN if storage in _PLAIN or BlockStorage.is_name(storage) else QUANTISED_ERROR
    for row, share in rows:
        if not share <= limit:
            yield f"row {row} differs from {target} by {share:.3g} times the error of {storage}"
            return
    if rows and not (median := float(np.median([share for _, share in rows]))) <= QUANTISED_ERROR_MEDIAN:
        yield f"half of {len(rows)} rows differ from {target} by {median:.3g} times the error of {storage}"


def sum_fault(raw: Array, value: Array, base: Array, storage: str, base_dtype: str) -> str | None:
    """What is wrong with a quantised sum of base and updates: "" for nothing, None if it cannot be determined here.

    raw: (n, bytes), as stored in ``storage``.  value, base: (n, width) float64; they differ by the update.
    base_dtype: dtype of the base's tensor, to which a merged file may have been rounded before it was quantised.
    Memory: several copies of the tensor in float64.
    """
    update = value - base
    size = float(np.linalg.norm(update))
    try:
        made = _most_similar(raw, value, storage, base_dtype)
    except (MissingDependency, NotExpressible):
        return None
    wrong = list(too_far(list(enumerate(_shares(raw, made, value, storage))), storage, "base plus updates"))
    if wrong or not size:
        return wrong[0] if wrong else ""
    best = decode(made, storage)
    # Errors that do not depend on the update project on it as on any direction: 1 / sqrt(number of elements).
    noise = QUANTISED_ERROR_MEDIAN * float(np.linalg.norm(best - value)) / update.size**0.5 / size
    if UPDATE_ERRORS * noise >= 0.5:
        return None
    arrived = 1 + float(np.vdot(decode(raw, storage) - best, update)) / size**2
    if not abs(arrived - 1) <= UPDATE_SHARE + UPDATE_ERRORS * noise:
        return f"expected the update once in {storage}, found it {arrived:.3g} times"
    return ""


def _most_similar(raw: Array, value: Array, storage: str, base_dtype: str) -> Array:
    """``value`` quantised directly or through a 16-bit dtype, whichever gives the most bytes of ``raw``."""
    candidates = [encode(value, storage)]
    candidates += [
        encode(cast(value, dtype), storage) for dtype in dict.fromkeys((base_dtype, *_THROUGH)) if dtype in FLOATS
    ]
    return max(candidates, key=lambda made: float((made == raw).mean()))


def _shares(raw: Array, made: Array, value: Array, storage: str) -> Array:
    """Error of each row as a multiple of that of the row quantised here."""
    errors = [np.linalg.norm(decode(rows, storage) - value, axis=1) for rows in (raw, made)]
    # A row that can be quantised without an error, such as a row of zeros, may have none.
    floor = np.finfo(np.float32).eps * np.linalg.norm(value, axis=1)
    shares: Array = np.where(errors[0] <= floor, 0.0, errors[0] / np.maximum(errors[1], np.maximum(floor, 1e-30)))
    return shares
