"""Compare rows of quantised tensors with their expected values.

A stored row passes if the verification quantises the expected row to the same bytes. If an artifact was quantised with
an importance matrix or with a different build of the quantiser, the stored bytes may differ from the bytes that the
verification computes. A stored row with different bytes passes if the row's quantisation error is at most a fixed
multiple of the error that results when the verification quantises the expected row.

For sums of base and updates, few stored rows match byte for byte even with the same quantiser, because the sums are
rounded differently before quantisation. The update of a quantised tensor is measured over all rows together, because an
update may be smaller than the quantisation error of a single row.
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

#: Dtypes of 16-bit files from which a quantisation may be made, regardless of the base's dtype.
_THROUGH: Final = ("F16", "BF16")
#: Quantisation types that do not depend on an importance matrix.
_PLAIN: Final = frozenset({"Q8_0", "TQ1_0", "TQ2_0", "MXFP4"})


@dataclass
class QuantisedRows:
    """The result of comparing the rows of one quantised tensor with rows that the verification quantised.

    identical: the number of rows whose stored bytes equal the bytes that the verification computed. others: for each
    row with different bytes, a tuple (row number, error of the stored row divided by the error of the row that the
    verification quantised). not_made: True if the verification could not quantise some of the rows.
    """

    storage: str
    identical: int = 0
    not_made: bool = False
    others: list[tuple[int, float]] = field(default_factory=list)

    def add(self, raw: Array, value: Array, base_dtype: str, first: int) -> None:
        """Quantise the rows of ``value``, compare them with the stored rows ``raw``, and add the result to the counts.

        raw: the bytes of the stored rows, of shape (n, bytes).
        value: the expected values of the rows, of shape (n, width).
        base_dtype: the dtype of the tensor in the base checkpoint.
        first: the row number of the first stored row.
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
        """Yield a message for each fault that was found in the compared rows.

        If most rows of a tensor match byte for byte, a row with different bytes is a fault. If few rows of a tensor
        match byte for byte, only rows with a quantisation error above the limit are faults.
        """
        if self.others and self.identical >= QUANTISED_IDENTICAL * (self.identical + len(self.others)):
            row = self.others[0][0]
            yield f"row {row} differs from the expected quantisation, but {self.identical} other rows match"
            return
        yield from too_far(self.others, self.storage, "the base")


def too_far(rows: list[tuple[int, float]], storage: str, target: str) -> Iterator[str]:
    """Yield a message for each exceeded limit: the limit for the error of any row, and the limit for the median error.

    rows: for each row, a tuple (row number, error of the stored row divided by the error of the row that the
    verification quantised). target: description of the expected values for messages, such as "the base".
    """
    limit = QUANTISED_ERROR_PLAIN if storage in _PLAIN or BlockStorage.is_name(storage) else QUANTISED_ERROR
    for row, share in rows:
        if not share <= limit:
            yield f"row {row}: the difference from {target} is {share:.3g} times the quantisation error of {storage}"
            return
    if rows and not (median := float(np.median([share for _, share in rows]))) <= QUANTISED_ERROR_MEDIAN:
        yield (
            f"the median difference of {len(rows)} rows from {target} "
            f"is {median:.3g} times the quantisation error of {storage}"
        )


def sum_fault(raw: Array, value: Array, base: Array, storage: str, base_dtype: str) -> str | None:
    """Compare a quantised tensor with the expected sum of base and updates, and return a description of the fault.

    Returns "" if the stored sum is correct. Returns None if the tensor cannot be checked: the update is too small, or
    the quantiser is not available.

    raw: the bytes of the stored rows in the quantisation type ``storage``, of shape (n, bytes).
    value: the base plus the update, as a float64 array of shape (n, width).
    base: the base without the update, as a float64 array of shape (n, width).
    base_dtype: the dtype of the tensor in the base checkpoint, because a merged file may have been rounded to this
    dtype before quantisation.

    Peak memory: a few copies of the tensor in float64.
    """
    update = value - base
    size = float(np.linalg.norm(update))
    try:
        made = _most_similar(raw, value, storage, base_dtype)
    except (MissingDependency, NotExpressible):
        return None
    wrong = list(too_far(list(enumerate(_shares(raw, made, value, storage))), storage, "base plus adapter updates"))
    if wrong or not size:
        return wrong[0] if wrong else ""
    best = decode(made, storage)
    # Errors independent of the update have a projection of 1 / sqrt(number of elements) on the update.
    noise = QUANTISED_ERROR_MEDIAN * float(np.linalg.norm(best - value)) / update.size**0.5 / size
    if UPDATE_ERRORS * noise >= 0.5:
        return None
    arrived = 1 + float(np.vdot(decode(raw, storage) - best, update)) / size**2
    if not abs(arrived - 1) <= UPDATE_SHARE + UPDATE_ERRORS * noise:
        return f"expected the adapter update to be added once in {storage}, found {arrived:.3g} times the update"
    return ""


def _most_similar(raw: Array, value: Array, storage: str, base_dtype: str) -> Array:
    """Quantise ``value`` directly and after rounding to 16 bits, and return the result most similar to ``raw``."""
    candidates = [encode(value, storage)]
    candidates += [
        encode(cast(value, dtype), storage) for dtype in dict.fromkeys((base_dtype, *_THROUGH)) if dtype in FLOATS
    ]
    return max(candidates, key=lambda made: float((made == raw).mean()))


def _shares(raw: Array, made: Array, value: Array, storage: str) -> Array:
    """Return the quantisation error of each stored row divided by the error of the corresponding row in ``made``.

    ``raw`` contains the stored rows, and ``made`` contains the rows that the verification quantised from ``value``.
    """
    errors = [np.linalg.norm(decode(rows, storage) - value, axis=1) for rows in (raw, made)]
    # A row without a quantisation error, such as a row of zeros, must be stored without an error.
    floor = np.finfo(np.float32).eps * np.linalg.norm(value, axis=1)
    shares: Array = np.where(errors[0] <= floor, 0.0, errors[0] / np.maximum(errors[1], np.maximum(floor, 1e-30)))
    return shares
