"""Checks of quantised artifacts by means over positions: against the tuned model, beside what the base so stored shows.

The excess is a difference of two means over the same positions. Both are draws of the noise that quantisation puts on
logits, so the difference has a standard error, which the gate knows: chance does not close it, and no fault widens it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from exporter.tensors import FLOATS
from exporter.verify.report import Check
from exporter.verify.running.metrics import Distance
from exporter.verify.tolerances import EXCESS_ERRORS, QUANTISED_EXCESS, QUANTISED_KL, ROUTED_ERRORS


def check_base(base: Distance, types: Collection[str]) -> Check:
    """The base in this quantisation is still the base: what is wrong with both would not be an excess."""
    return _check_median("base as stored", base, types, "median KL of the base so stored")


def check_alone(tuned: Distance, types: Collection[str]) -> Check:
    """The artifact is still the tuned model: all that can be said of it without the base in this quantisation."""
    return _check_median("tuned as stored", tuned, types, "median KL")


def _check_median(name: str, found: Distance, types: Collection[str], what: str) -> Check:
    kind = "Q8_0" if types and set(types) <= {*FLOATS, "Q8_0"} else "coarser"
    return Check.at_most(name, found.kl_median, QUANTISED_KL[kind], f"{what}, {found.positions} positions")


def check_excess(
    tuned: Distance, base: Distance, lengths: Sequence[int], varied: int, errors: float = EXCESS_ERRORS
) -> Check:
    """An artifact may be as far from the tuned model as the base so stored is from the base, but for noise.

    Both over the same positions.  lengths: positions of each sequence.  varied: how many of all positions tuning
    touches; at the others both compute the same, but for a few columns.  errors: standard errors that it may be.
    """
    error = standard_error(tuned, base, lengths, varied)
    means = f"mean KL {tuned.kl:.3g}, of the base so stored {base.kl:.3g}"
    detail = f"{means}, {tuned.positions} positions, standard error {error:.2g}"
    limit = max(QUANTISED_EXCESS, errors * error)
    return Check.at_most("excess KL", _excess(tuned.kl, base.kl), limit, detail)


def check_routed(
    tuned: Distance, base: Distance, lengths: Sequence[int], varied: int, most: float | None
) -> Iterator[Check]:
    """The same where a router chooses between experts, and the median, which a few that are sent elsewhere do not move.

    most: what half of the positions stay within; None: their excess over the base's is limited as that of all is for
    other models.
    """
    yield check_excess(tuned, base, lengths, varied, ROUTED_ERRORS)
    detail = f"median KL {tuned.kl_median:.3g}, of the base so stored {base.kl_median:.3g}"
    if most is None:
        yield Check.at_most("excess KL, median", _excess(tuned.kl_median, base.kl_median), QUANTISED_EXCESS, detail)
    else:
        yield Check.at_most("median KL", tuned.kl_median, most, detail)


def standard_error(tuned: Distance, base: Distance, lengths: Sequence[int], varied: int) -> float:
    """Standard error of the excess, a share of the base's mean: the smaller one of two estimates.

    From the differences by position, sqrt(Σ(d - mean)²), or where that is more from their sums by sequence, whose
    positions depend on each other: sqrt(Σ(Σd - n·mean)²), which of few sequences alone would be a guess.
    And as if ``varied`` positions drew their KL anew, as the base's positions drew theirs: deviation · sqrt(2 varied).
    That one knows nothing of pairs, but the artifact, which could widen its own, cannot widen it.
    """
    if not base.kl > 0:
        return 0.0
    alone = float(base.kl_at.std()) * (2 * varied) ** 0.5
    difference = tuned.kl_at - base.kl_at
    centred = difference - difference.mean()
    sums = np.add.reduceat(centred, np.cumsum([0, *lengths[:-1]]))
    paired = max(np.linalg.norm(centred), np.linalg.norm(sums))
    return float(np.fmin(alone, paired)) / base.positions / base.kl


def _excess(tuned: float, base: float) -> float:
    return (tuned - base) / base if base > 0 else float(np.sign(tuned))
