"""Check quantised artifacts by their mean KL over positions, relative to the base in the same quantisation.

The excess is the difference of two means over the same positions. The two means contain the noise of quantisation, so
the difference has a standard error. The limit allows for the standard error, so chance does not fail the check. A fault
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
    """Check that the quantised base is close to the base.

    The excess check cannot detect errors of the quantised base.
    """
    return _check_median("base as stored", base, types, "median KL of the base in the same quantisation")


def check_alone(tuned: Distance, types: Collection[str]) -> Check:
    """Check that the artifact is close to the tuned model, if no base in the same quantisation is available."""
    return _check_median("tuned as stored", tuned, types, "median KL")


def _check_median(name: str, distance: Distance, types: Collection[str], description: str) -> Check:
    limit_name = "Q8_0" if types and set(types) <= {*FLOATS, "Q8_0"} else "coarser"
    return Check.at_most(
        name, distance.kl_median, QUANTISED_KL[limit_name], f"{description}, {distance.positions} positions"
    )


def check_excess(
    tuned: Distance, base: Distance, lengths: Sequence[int], varied: int, errors: float = EXCESS_ERRORS
) -> Check:
    """Check that the artifact's mean KL exceeds that of the quantised base by at most QUANTISED_EXCESS or the noise.

    tuned, base: distances over the same positions.  lengths: number of positions of each sequence.
    varied: number of positions that tuning affects. At any other position, logits of tuned model and base differ in a
    few columns only.
    errors: accepted number of standard errors.
    """
    error = standard_error(tuned, base, lengths, varied)
    means = f"mean KL {tuned.kl:.3g}, mean KL of the base in the same quantisation {base.kl:.3g}"
    detail = f"{means}, {tuned.positions} positions, standard error {error:.2g}"
    limit = max(QUANTISED_EXCESS, errors * error)
    return Check.at_most("excess KL", _excess(tuned.kl, base.kl), limit, detail)


def check_routed(
    tuned: Distance, base: Distance, lengths: Sequence[int], varied: int, most: float | None
) -> Iterator[Check]:
    """Check the excess of a mixture of experts by mean and median KL.

    A few tokens routed to different experts do not move the median.

    most: limit for the median KL, or None to limit the excess of the median by QUANTISED_EXCESS.
    """
    yield check_excess(tuned, base, lengths, varied, ROUTED_ERRORS)
    detail = f"median KL {tuned.kl_median:.3g}, median KL of the base in the same quantisation {base.kl_median:.3g}"
    if most is None:
        yield Check.at_most("excess KL, median", _excess(tuned.kl_median, base.kl_median), QUANTISED_EXCESS, detail)
    else:
        yield Check.at_most("median KL", tuned.kl_median, most, detail)


def standard_error(tuned: Distance, base: Distance, lengths: Sequence[int], varied: int) -> float:
    """Standard error of the excess as a share of the base's mean KL. The result is the smaller of two estimates.

    The paired estimate is the larger of sqrt(Σ(d - mean)²), from the differences d by position, and sqrt(Σ(Σd -
    n·mean)²), from the sums of d by sequence. The sums are needed because positions of a sequence depend on each other,
    but sums of few sequences are unreliable. The independent estimate is deviation · sqrt(2 varied), as if ``varied``
    positions had a new KL drawn from the base's distribution. A faulty artifact can raise the paired estimate, but
    cannot raise the independent estimate, which ignores the pairing.
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
