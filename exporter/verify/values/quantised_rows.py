"""Rows of quantised tensors against what they have to hold: the same bytes, or an error that their type explains.

A quantiser that was told what matters (an importance matrix), or of another build, makes other bytes everywhere: its
rows may be as far off as rows quantised here are, but for a factor. Of sums of base and updates few rows have the same
bytes even from the same quantiser, and an update may be smaller than the error: it has to arrive in the sum over all.
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

#: Quantisations may be made from a 16-bit file, whatever the base's dtype.
_THROUGH: Final = ("F16", "BF16")
#: Nothing that a quantiser is told changes what it makes of these.
_PLAIN: Final = frozenset({"Q8_0", "TQ1_0", "TQ2_0", "MXFP4"})


@dataclass
class QuantisedRows:
    """Rows of one quantised tensor: how many have the bytes that they get here, and how far the others are off."""

    kind: str
    alike: int = 0
    unknown: bool = False
    others: list[tuple[int, float]] = field(default_factory=list)

    def add(self, raw: Array, value: Array, stored: str, first: int) -> None:
        """Compare rows from ``first`` on with ``value`` (n, width), whose base is ``stored`` so."""
        try:
            made = encode(value, self.kind)
        except (MissingDependency, NotExpressible):
            self.unknown = True
            return
        differs = (made != raw).any(axis=1)
        for dtype in dict.fromkeys((stored, *_THROUGH)):
            if differs.any() and dtype in FLOATS:
                differs[differs] = (encode(cast(value[differs], dtype), self.kind) != raw[differs]).any(axis=1)
        self.alike += int((~differs).sum())
        if differs.any():
            wide = value[differs].astype(np.float64)
            shares = _shares(raw[differs], made[differs], wide, self.kind)
            self.others += [
                (first + int(row), float(share)) for row, share in zip(np.flatnonzero(differs), shares, strict=True)
            ]

    def faults(self) -> Iterator[str]:
        """Rows that stand out among rows with the same bytes, or that are too far off."""
        if self.others and self.alike >= QUANTISED_IDENTICAL * (self.alike + len(self.others)):
            yield f"row {self.others[0][0]} is not quantised as the {self.alike} others are"
            return
        yield from too_far(self.others, self.kind, "the base's")


def too_far(rows: list[tuple[int, float]], kind: str, whose: str) -> Iterator[str]:
    """The first row that is farther off than its type explains, else all of them if half are.

    rows: (row, its error as a multiple of that of the row quantised here).
    """
    limit = QUANTISED_ERROR_PLAIN if kind in _PLAIN or BlockStorage.is_name(kind) else QUANTISED_ERROR
    for row, share in rows:
        if not share <= limit:
            yield f"row {row} is {share:.3g} times as far from {whose} as it need be in {kind}"
            return
    if rows and not (median := float(np.median([share for _, share in rows]))) <= QUANTISED_ERROR_MEDIAN:
        yield f"half of {len(rows)} rows are {median:.3g} times as far from {whose} as they need be in {kind}"


def sum_fault(raw: Array, value: Array, base: Array, kind: str, stored: str) -> str | None:
    """The empty text for a sum of base and updates, else what is wrong with it; None if that cannot be known here.

    raw: (n, bytes), as stored in ``kind``.  value, base: (n, width) float64; they differ by the update.  stored: the
    base's dtype, in which a merged file may have been before it was quantised.
    Memory: the tensor some times in float64.
    """
    update = value - base
    size = float(np.linalg.norm(update))
    try:
        made = _likest(raw, value, kind, stored)
    except (MissingDependency, NotExpressible):
        return None
    wrong = list(too_far(list(enumerate(_shares(raw, made, value, kind))), kind, "base plus updates"))
    if wrong or not size:
        return wrong[0] if wrong else ""
    best = decode(made, kind)
    # Errors that know nothing of the update have a share of it as any direction has: one in sqrt(numbers).
    noise = QUANTISED_ERROR_MEDIAN * float(np.linalg.norm(best - value)) / update.size**0.5 / size
    if UPDATE_ERRORS * noise >= 0.5:
        return None
    arrived = 1 + float(np.vdot(decode(raw, kind) - best, update)) / size**2
    if not abs(arrived - 1) <= UPDATE_SHARE + UPDATE_ERRORS * noise:
        return f"{arrived:.3g} times the update has arrived in {kind}"
    return ""


def _likest(raw: Array, value: Array, kind: str, stored: str) -> Array:
    """``value`` quantised by the way over the dtype that gives the most rows their bytes."""
    ways = [encode(value, kind)]
    ways += [encode(cast(value, dtype), kind) for dtype in dict.fromkeys((stored, *_THROUGH)) if dtype in FLOATS]
    return max(ways, key=lambda made: float((made == raw).mean()))


def _shares(raw: Array, made: Array, value: Array, kind: str) -> Array:
    """Error of each row as a multiple of that of the row quantised here."""
    errors = [np.linalg.norm(decode(one, kind) - value, axis=1) for one in (raw, made)]
    # A row that is quantised without an error, such as one of zeros, need not have any.
    floor = np.finfo(np.float32).eps * np.linalg.norm(value, axis=1)
    shares: Array = np.where(errors[0] <= floor, 0.0, errors[0] / np.maximum(errors[1], np.maximum(floor, 1e-30)))
    return shares
