"""Trained tokens in the sequences that are run: each is an input and a target."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from exporter.verify.running.prompts import Sequences, weave

CARRIERS = [[9001, 9002], [9003 + number for number in range(12)], [9100 + number for number in range(60)]]
#: At most sixteen sequences, so that the cost of a verification does not grow with the adapter.
MOST = 16


@given(count=st.integers(1, 3000), limit=st.integers(2, 40))
def test_every_covered_token_is_an_input_and_a_target_at_a_bounded_cost(count: int, limit: int) -> None:
    sequences, covered = weave(list(range(count)), CARRIERS, limit)
    inputs = {token for ids in sequences for token in ids}
    targets = {token for ids in sequences for token in ids[1:]}
    assert set(covered) <= inputs & targets
    assert len(sequences) <= MOST
    assert all(len(ids) <= limit for ids in sequences)
    if count <= MOST * (limit - 1):
        assert covered == list(range(count))
    else:
        assert len(set(covered)) == MOST * (limit - 1)
        assert {0, count - 1} <= set(covered)


def test_few_trained_tokens_stand_apart_in_the_text() -> None:
    (ids,), _ = weave([1, 2, 3], [CARRIERS[2]], 40)
    places = [ids.index(token) for token in (1, 2, 3)]
    assert all(later - earlier > 5 for earlier, later in pairwise(places))
    assert [token for token in ids if token > 3] == CARRIERS[2][:37]


def test_kinds_follow_the_trained_tokens() -> None:
    sequences = Sequences([[7, 8]], [[1, 7]], [[7, 1, 2, 8, 9]], [], [], [1, 2])
    assert list(sequences.kinds()) == [
        ["control"] * 2,
        ["user"] * 2,
        ["trained as target", "trained as input", "trained as input", "beside trained", "beside trained"],
    ]
