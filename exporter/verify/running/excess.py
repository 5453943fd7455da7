"""Checks of quantised artifacts by mean KL over positions, relative to the base in the same quantisation.

The excess is the difference of two means over the same positions. Both contain the noise that quantisation adds to
logits, so the difference has a standard error, and the limit allows for it: chance does not fail the check, and a fault
in the artifact does not raise the limit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from exporter.tensors import FLOATS
from exporter.verify.report import Check
from exporter.verify.running.metrics import Distance
from exporter.verify.tolerances import EXCESS_ERRORS, QUANTISED_EXCESS, QUANTISED_KL, ROUTED_ERRORS


def check_base(base: Distance, types: Collection[str]) -> Check:
    """The base in this quantisation is close to the base: the excess check cannot see errors common to both."""
    return _check_median("base as stored", base, types, "median KL of the base in the same quantisation")


def check_alone(tuned: Distance, types: Collection[str]) -> Check:
    """The artifact is close to the tuned model: the only check without the base in the same quantisation."""
    return _check_median("tuned as stored", tuned, types, "median KL")


def _check_median(name: str, distance: Distance, types: Collection[str], description: str) -> Check:
    limit_name = "Q8_0" if types and set(types) <= {*FLOATS, "Q8_0"} else "coarser"
    return Check.at_most(
        name, distance.kl_median, QUANTISED_KL[limit_name], f"{description}, {distance.positions} positions"
    )


def check_excess(
    tuned: Distance, base: Distance, lengths: Sequence[int], varied: int, errors: float = EXCESS_ERRORS
) -> Check:
    """The artifact's mean KL from the tuned model is at most the quantised base's from the base, up to noise.

    tuned, base: over the same positions.  lengths: positions of each sequence.  varied: number of positions that tuning
    affects; at the others both compute the same, except for a few columns.  errors: accepted standard errors.
    """
    error = standard_error(tuned, base, lengths, varied)
    means = f"mean KL {tuned.kl:.3g}, of the base in the same quantisation {base.kl:.3g}"
    detail = f"{means}, {tuned.positions} positions, standard error {error:.2g}"
    limit = max(QUANTISED_EXCESS, errors * error)
    return Check.at_most("excess KL", _excess(tuned.kl, base.kl), limit, detail)


def check_routed(
    tuned: Distance, base: Distance, lengths: Sequence[int], varied: int, most: float | None
) -> Iterator[Check]:
    """The same for mixtures of experts, and the median KL, which a few tokens at other experts do not move.

    most: limit of the median KL; None limits the median's excess over that of the base as the mean's is limited for
    other models.
    """
    yield check_excess(tuned, base, lengths, varied, ROUTED_ERRORS)
    detail = f"median KL {tuned.kl_median:.3g}, of the base in the same quantisation {base.kl_median:.3g}"
    if most is None:
        yield Check.at_most("excess KL, median", _excess(tuned.kl_median, base.kl_median), QUANTISED_EXCESS, detail)
    else:
        yield Check.at_most("median KL", tuned.kl_median, most, detail)


def standard_error(tuned: Distance, base: Distance, lengths: Sequence[int], varied: int) -> float:
    """Standard error of the excess, as a share of the base's mean: the smaller of two estimates.

    Paired: from the differences d by position, sqrt(Σ(d - mean)²), or from their sums by sequence if that is larger, as
    positions of a sequence depend on each other: sqrt(Σ(Σd - n·mean)²), unreliable alone for few sequences.
    Independent: as if ``varied`` positions had a new KL drawn from the base's distribution, deviation · sqrt(2 varied).
    It ignores the pairing, but a faulty artifact, which can raise the paired estimate, cannot raise this one.
    """
    if not base.kl > 0:
        return 0.0
    independent = float(base.kl_at.std()) * (2 * varied) ** 0.5
    difference = tuned.kl_at - base.kl_at
    centred = difference - difference.mean()
    sums = np.add.reduceat(centred, np.cumsum([0, *lengths[:-1]]))
    paired = max(np.linalg.norm(centred), np.linalg.norm(sums))
    return float(np.fmin(independent, paired)) / base.positions / base.kl


def _excess(tuned: float, base: float) -> float:
    return (tuned - base) / base if base > 0 else float(np.sign(tuned))
