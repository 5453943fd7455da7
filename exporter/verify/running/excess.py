"""Check a quantised artifact by its mean KL divergence, relative to that of the untuned base with equal quantisation.

The excess is the artifact's mean KL minus the quantised base's mean KL, both over the same positions. The excess has a
standard error, because quantisation noise affects the two means. The limit for the excess includes the standard error,
so noise alone does not fail the check. A fault in the artifact cannot raise the limit for the excess.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from exporter.tensors import FLOATS
from exporter.verify.report import Check
from exporter.verify.running.metrics import Distance
from exporter.verify.tolerances import EXCESS_ERRORS, QUANTISED_EXCESS, QUANTISED_KL, ROUTED_ERRORS


def check_base(base: Distance, types: Collection[str]) -> Check:
    """Check that the quantised base is close to the unquantised base.

    The quantised base needs a separate check, because the excess check cannot detect errors of the quantised base.
    """
    return _check_median("base as stored", base, types, "median KL of the equally quantised base")


def check_alone(tuned: Distance, types: Collection[str]) -> Check:
    """Check that the artifact is close to the tuned model, for artifacts that have no equally quantised base."""
    return _check_median("tuned as stored", tuned, types, "median KL")


def _check_median(name: str, distance: Distance, types: Collection[str], description: str) -> Check:
    limit_name = "Q8_0" if types and set(types) <= {*FLOATS, "Q8_0"} else "coarser"
    return Check.at_most(
        name, distance.kl_median, QUANTISED_KL[limit_name], f"{description} over {distance.positions} positions"
    )


def check_excess(
    tuned: Distance, base: Distance, lengths: Sequence[int], varied: int, errors: float = EXCESS_ERRORS
) -> Check:
    """Check that the artifact's mean KL exceeds the quantised base's mean KL by at most QUANTISED_EXCESS or the noise.

    tuned, base: distances of the artifact and of the quantised base from their references, over equal positions.
    lengths: number of positions of each sequence.
    varied: number of positions where tuning affects all logits. At any other position, the tuned model's logits differ
    from the base's logits in only a few columns of the vocabulary.
    errors: number of standard errors by which the excess may exceed zero.
    """
    error = standard_error(tuned, base, lengths, varied)
    detail = (
        f"mean KL {tuned.kl:.3g}, mean KL of the equally quantised base {base.kl:.3g}, "
        f"both over {tuned.positions} positions, standard error {error:.2g}"
    )
    limit = max(QUANTISED_EXCESS, errors * error)
    return Check.at_most("excess KL", _excess(tuned.kl, base.kl), limit, detail)


def check_routed(
    tuned: Distance, base: Distance, lengths: Sequence[int], varied: int, most: float | None
) -> Iterator[Check]:
    """Check the excess of a mixture-of-experts model by its mean KL and its median KL.

    A few tokens that are routed to different experts can raise the mean KL but hardly change the median KL.

    most: limit for the median KL, or None to limit the median's excess over the base by QUANTISED_EXCESS.
    """
    yield check_excess(tuned, base, lengths, varied, ROUTED_ERRORS)
    detail = f"median KL {tuned.kl_median:.3g}, median KL of the equally quantised base {base.kl_median:.3g}"
    if most is None:
        yield Check.at_most("excess KL, median", _excess(tuned.kl_median, base.kl_median), QUANTISED_EXCESS, detail)
    else:
        yield Check.at_most("median KL", tuned.kl_median, most, detail)


def standard_error(tuned: Distance, base: Distance, lengths: Sequence[int], varied: int) -> float:
    """Return the standard error of the excess, divided by the base's mean KL.

    The standard error is the smaller of a paired and an independent estimate.

    The paired estimate is the larger of sqrt(Σ(d - mean)²), over the differences d at all positions, and sqrt(Σ(Σd -
    n·mean)²), over the sums of d for all sequences. The paired estimate uses sums over sequences because the positions
    of a sequence are correlated, and uses single positions because few sequences give an unreliable estimate. The
    independent estimate is deviation · sqrt(2 varied), as if the KL at ``varied`` positions were drawn anew from the
    base's distribution. A faulty artifact can raise the paired estimate, but not the independent estimate, which uses
    only the base's KL.
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
