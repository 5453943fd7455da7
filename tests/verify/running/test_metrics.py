"""Figures of two arrays of logits, against values computed by hand or independently."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.verify.running.metrics import compare, pool

RNG = np.random.default_rng(1)
WANT = RNG.normal(0, 2, (20, 50)).astype(np.float32)
IDS = list(range(20))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))


def test_equal_logits_are_no_distance_apart() -> None:
    figures = compare(WANT, WANT, IDS).figures()
    assert (figures["top-1"], figures["top-5"]) == (1, 1)
    assert {figures[name] for name in ("mean KL", "KL p99", "KL max", "max abs", "perplexity difference")} == {0}


def test_kl_and_perplexity_are_those_of_the_definition() -> None:
    got = WANT + RNG.normal(0, 0.1, WANT.shape).astype(np.float32)
    distance = compare(WANT, got, IDS)
    p, q = log_softmax(WANT), log_softmax(got)
    np.testing.assert_allclose(distance.kl_at, (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-9)
    assert distance.kl_p99 == pytest.approx(np.quantile(distance.kl_at, 0.99))
    # position n predicts token n + 1; nothing follows the last
    perplexity = [np.exp(-np.mean([log_p[n, IDS[n + 1]] for n in range(19)])) for log_p in (p, q)]
    assert distance.perplexities == pytest.approx(tuple(perplexity))


def test_a_token_without_a_column_does_not_count_for_perplexity() -> None:
    distance = compare(WANT, WANT, [0, 1, 50, 51, *range(4, 20)])
    assert np.isnan(distance.surprise_at[:, 0]).tolist() == [False, True, True] + [False] * 16 + [True]


def test_top_5_counts_shared_best_tokens_and_ties_have_no_order() -> None:
    want = np.zeros((1, 10), np.float32)
    want[0, :6] = [9, 8, 7, 6, 5, 5]  # two tokens are fifth best
    got = want.copy()
    got[0, 4] = 0  # the other fifth replaces it
    assert compare(want, got).top5_at.tolist() == [1.0]
    got[0, 0] = -1
    got[0, 9] = 20  # the first is out, another token is in
    assert compare(want, got).top5_at.tolist() == [0.8]


def test_one_nan_makes_every_figure_of_its_text_worthless() -> None:
    got = WANT.copy()
    got[3, 3] = np.nan
    distance = pool([compare(WANT, WANT, IDS), compare(WANT, got, IDS)])
    assert np.isnan([distance.kl, distance.kl_max, distance.max_abs]).all()
    assert distance.misses == 20
    assert distance.positions == 40


def test_a_perplexity_beyond_any_number_is_infinite() -> None:
    got = np.zeros((2, 3), np.float32)
    got[0, 0] = 2000
    want_perplexity, got_perplexity = compare(np.zeros((2, 3), np.float32), got, [1, 2]).perplexities
    assert want_perplexity == pytest.approx(3)
    assert got_perplexity == np.inf
