"""Checks of means over positions: chance does not fail them, a fault does, and a fault does not raise their limits."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.tensors import Array
from exporter.verify.report import Check
from exporter.verify.running.excess import check_base, check_excess, check_routed, standard_error
from exporter.verify.running.metrics import Distance
from exporter.verify.tolerances import QUANTISED_EXCESS, QUANTISED_KL, ROUTED_ERRORS

SEQUENCES, LENGTH = 32, 40
LENGTHS = [LENGTH] * SEQUENCES
POSITIONS = SEQUENCES * LENGTH


def positions(kl: Array | list[float]) -> Distance:
    """A distance in which only the KL by position matters."""
    kl = np.asarray(kl, np.float64)
    return Distance(kl, kl, np.ones(len(kl)), np.ones(len(kl)), np.full((len(kl), 2), np.nan))


def noisy(seed: int, share: float = 1.0) -> tuple[Distance, Distance]:
    """KL of tuned and base as in SmolLM2 in Q8_0: a long tail, and for a share of the positions independent values."""
    rng = np.random.default_rng(seed)
    base, other = np.exp(rng.normal(-5.3, 1.1, (2, POSITIONS)))
    return positions(np.where(rng.random(POSITIONS) < share, other, base)), positions(base)


def test_a_shift_beyond_the_limit_fails_the_check() -> None:
    base = positions(np.full(POSITIONS, 1e-2))

    def passes(excess: float) -> bool:
        return check_excess(positions(base.kl_at * (1 + excess)), base, LENGTHS, POSITIONS).passed

    assert passes(0.9 * QUANTISED_EXCESS)
    assert not passes(1.1 * QUANTISED_EXCESS)
    lossless = positions(np.zeros(POSITIONS))
    assert check_excess(lossless, lossless, LENGTHS, POSITIONS).passed
    assert not check_excess(positions(np.full(POSITIONS, 1e-9)), lossless, LENGTHS, POSITIONS).passed


def test_chance_fails_no_check_though_it_often_exceeds_the_share_alone() -> None:
    """All positions are independent, as with an adapter of inner weights: pairing does not lower the noise."""
    checks = [check_excess(*noisy(seed), LENGTHS, POSITIONS) for seed in range(500)]
    assert all(check.passed for check in checks)
    assert sum(check.value > QUANTISED_EXCESS for check in checks if check.value is not None) > 10


def test_no_real_shift_hides_behind_noise() -> None:
    for seed in range(300):
        tuned, base = noisy(seed, share=0.4)
        worse = positions(tuned.kl_at * 1.5)
        assert not check_excess(worse, base, LENGTHS, round(0.4 * POSITIONS)).passed, f"seed {seed}"


def test_a_few_positions_with_a_large_kl_do_not_raise_their_own_limit() -> None:
    tuned, base = noisy(0, share=0.0)
    broken = tuned.kl_at.copy()
    broken[7] += 1.5 * POSITIONS * base.kl
    check = check_excess(positions(broken), base, LENGTHS, POSITIONS // 2)
    assert not check.passed
    assert check.limit is not None
    assert check.limit < 0.25


def test_the_standard_error_is_that_of_many_draws() -> None:
    """Both estimates, against the spread of the excess over 400 draws."""
    for share in (0.3, 1.0):
        draws = [noisy(seed, share) for seed in range(400)]
        spread = np.std([(tuned.kl - base.kl) / base.kl for tuned, base in draws])
        errors = [standard_error(tuned, base, LENGTHS, round(share * POSITIONS)) for tuned, base in draws]
        assert np.median(errors) == pytest.approx(spread, rel=0.2)


def test_a_value_that_is_no_number_fails_every_check() -> None:
    base, broken = positions(np.full(POSITIONS, 1e-2)), positions(np.full(POSITIONS, np.nan))
    assert not check_excess(broken, base, LENGTHS, POSITIONS).passed
    assert not any(check.passed for check in check_routed(broken, base, LENGTHS, POSITIONS, None))
    assert not check_base(broken, {"Q8_0"}).passed


@pytest.mark.parametrize(
    ("limit_name", "types"), [("Q8_0", {"F32", "Q8_0"}), ("coarser", {"Q8_0", "Q4_0"}), ("coarser", {})]
)
def test_a_quantised_base_that_is_far_from_the_base_fails_its_check(limit_name: str, types: set[str]) -> None:
    limit = QUANTISED_KL[limit_name]
    assert check_base(positions([0.9 * limit, 0.9 * limit, 50 * limit]), types).passed
    assert not check_base(positions([1.1 * limit, 1.1 * limit, 0.0]), types).passed


def test_a_routers_jumps_raise_the_limit_of_the_mean_by_the_noise_of_the_base() -> None:
    base = positions([*[1e-3] * 99, 0.1])
    error = np.std(base.kl_at) * np.sqrt(40) / 100 / base.kl

    def jumped(errors: float) -> list[Check]:
        more = errors * error * base.kl * 100
        tuned = positions([*[1e-3] * 98, 1e-3 + more, 0.1])
        return list(check_routed(tuned, base, [10] * 10, 20, None))

    assert [check.passed for check in jumped(0.9 * ROUTED_ERRORS)] == [True, True]
    assert [check.passed for check in jumped(1.1 * ROUTED_ERRORS)] == [False, True]


@pytest.mark.parametrize("most", [None, 1e-3])
def test_a_deviation_at_most_positions_is_no_routers_jump(most: float | None) -> None:
    base = positions([*[1e-3] * 99, 0.5])
    limit = most or 1e-3 * (1 + QUANTISED_EXCESS)

    def passed(by: float) -> list[bool]:
        return [check.passed for check in check_routed(positions([*[by] * 99, 0.5]), base, [10] * 10, 20, most)]

    assert passed(0.99 * limit) == [True, True]
    assert passed(1.01 * limit)[1] is False
