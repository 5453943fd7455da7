"""Compare the mean KL divergence that quantisation causes in an artifact and in the equally quantised, untuned base.

The excess is (a - b) / b, where a is the mean KL of the artifact from the tuned model, and b is the mean KL of the
quantised base from the unquantised base, over the same positions. The excess has a standard error, because both mean
KLs depend on random quantisation noise. The limit for the excess grows with the standard error, so that noise alone
does not make the check fail. The standard error is at most an estimate from the base's KL alone, so a faulty artifact
cannot raise the limit above this estimate.
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

    The quantised base needs this check, because a comparison of the artifact with a faulty quantised base would be
    meaningless.
    """
    return _check_median("base as stored", base, types, "median KL of the equally quantised base")


def check_alone(tuned: Distance, types: Collection[str]) -> Check:
    """Check that the artifact is close to the tuned model if no equally quantised base is available for comparison."""
    return _check_median("tuned as stored", tuned, types, "median KL")


def _check_median(name: str, distance: Distance, types: Collection[str], description: str) -> Check:
    limit_name = "Q8_0" if types and set(types) <= {*FLOATS, "Q8_0"} else "coarser"
    return Check.at_most(
        name, distance.kl_median, QUANTISED_KL[limit_name], f"{description} over {distance.positions} positions"
    )


def check_excess(
    tuned: Distance, base: Distance, lengths: Sequence[int], varied: int, errors: float = EXCESS_ERRORS
) -> Check:
    """Check that the excess of the artifact's mean KL over the quantised base's mean KL is within the limit.

    The limit for the excess is the larger of QUANTISED_EXCESS and ``errors`` standard errors. tuned: distance of the
    artifact from the tuned model. base: distance of the quantised base from the untuned model, at the same positions.
    lengths: number of positions of each sequence. varied: number of positions where tuning affects the logits of all
    tokens of the vocabulary. At positions that ``varied`` excludes, tuning affects only the logits of trained tokens.
    errors: number of standard errors that the limit allows.
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
    """Check both the mean KL and the median KL of a mixture-of-experts model.

    If a few tokens are routed to different experts than in the reference, the mean KL rises, but the median KL hardly
    changes.

    most: limit for the median KL, or None to limit the median KL to (1 + QUANTISED_EXCESS) times the median KL of the
    quantised base.
    """
    yield check_excess(tuned, base, lengths, varied, ROUTED_ERRORS)
    detail = f"median KL {tuned.kl_median:.3g}, median KL of the equally quantised base {base.kl_median:.3g}"
    if most is None:
        yield Check.at_most("excess KL, median", _excess(tuned.kl_median, base.kl_median), QUANTISED_EXCESS, detail)
    else:
        yield Check.at_most("median KL", tuned.kl_median, most, detail)


def standard_error(tuned: Distance, base: Distance, lengths: Sequence[int], varied: int) -> float:
    """Return the standard error of the excess (a - b) / b of an artifact's mean KL a over a quantised base's mean KL b.

    The standard error of the excess is the smaller of two estimates, called the paired and the independent estimate.

    The paired estimate uses the difference d between the artifact's KL and the base's KL at each position. The paired
    estimate is the larger of sqrt(Σ(d - mean d)²), summed over all positions, and sqrt(Σs²), summed over all sequences,
    where s is the sum of d - mean d over the positions of a sequence. The paired estimate considers whole sequences
    because the positions of a sequence are correlated, and considers single positions because an estimate from few
    sequences is unreliable. The independent estimate is the standard deviation of the base's KL times sqrt(2
    ``varied``), as if the KL values at ``varied`` positions were independent draws from the base's distribution. A
    faulty artifact can raise the paired estimate, but not the independent estimate, which uses only the base's KL.
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
