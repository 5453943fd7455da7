from __future__ import annotations

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.errors import BadInput
from exporter.merge.passes import AddVector, Cast, Pass, ReplaceRows
from exporter.tensors import DTYPES, Array, TensorSpec
from tests.sources.folders import matrix


def whole(step: Pass, value: Array) -> Array:
    return step.apply(0, value)


@given(st.sets(st.integers(0, 29), min_size=1).map(sorted), st.integers(0, 29), st.integers(0, 30))
def test_rows_are_replaced_in_any_block_as_in_the_whole(ids: list[int], start: int, length: int) -> None:
    base, rows = matrix(30), matrix(len(ids), start=1000)
    step = ReplaceRows(tuple(ids), rows, 30)
    want = base.copy()
    want[ids] = rows
    stop = min(30, start + length)
    np.testing.assert_array_equal(step.apply(start, base[start:stop]), want[start:stop])
    np.testing.assert_array_equal(base, matrix(30))


@given(st.sets(st.integers(0, 40), min_size=1).map(sorted))
def test_touched_is_exactly_the_ids_in_runs(ids: list[int]) -> None:
    runs = ReplaceRows(tuple(ids), matrix(len(ids)), 41).touched(41)
    assert [row for start, stop in runs for row in range(start, stop)] == ids
    assert all(run[1] < following[0] for run, following in pairwise(runs)), "adjacent runs are one"


def test_rows_keep_their_bits() -> None:
    rows = np.array([[0x7FC1, 0x8000, 0x0001, 0xFF80]], np.uint16).view(ml_dtypes.bfloat16)
    out = whole(ReplaceRows((2,), rows, 6), matrix(dtype=ml_dtypes.bfloat16))
    np.testing.assert_array_equal(out[2].view(np.uint16), rows[0].view(np.uint16))


def test_an_untouched_block_is_not_copied() -> None:
    block = matrix()
    assert ReplaceRows((9,), matrix(1), 10).apply(0, block) is block


def test_a_matrix_grows_to_the_given_number_of_rows() -> None:
    assert ReplaceRows((6,), matrix(1), 7).out_spec(TensorSpec("x", "F32", (6, 4))).shape == (7, 4)


def test_only_floats_are_cast() -> None:
    for dtype in DTYPES:
        out = Cast("F16").out_spec(TensorSpec("x", dtype, (2, 3)))
        assert out.dtype == ("F16" if dtype in ("F64", "F32", "BF16", "F16") else dtype)
        assert out.shape == (2, 3)


@pytest.mark.parametrize("value", [65520.0, -1e30, np.inf])
def test_values_beyond_float16_are_refused_with_their_rows(value: float) -> None:
    block = matrix()
    block[3, 1] = value
    with pytest.raises(BadInput, match="rows 10 to 15: expected values up to 65504"):
        Cast("F16").apply(10, block)
    block[3, 1] = 65519.0  # rounds down to the largest
    assert Cast("F16").apply(10, block)[3, 1] == 65504


def test_infinity_of_the_input_is_kept() -> None:
    block = np.array([[np.inf, -np.inf]], np.float32)
    np.testing.assert_array_equal(Cast("BF16").apply(0, block).astype(np.float32), block)


def test_a_sum_of_biases_that_nearly_cancel_is_rounded_once() -> None:
    base, added = np.array([0.1, 3e4], np.float32), np.array([-0.1 + 1e-9, 4e4])
    out = AddVector(added, "F32").apply(0, base)
    np.testing.assert_array_equal(out, (base.astype(np.float64) + added).astype(np.float32))
    assert out[0] != base[0] + np.float32(added[0])
    with pytest.raises(BadInput, match="rows 0 to 1: expected values up to 65504"):
        AddVector(added, "F16").apply(0, base.astype(np.float16))
