from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.sources.hf.safetensors import FileTensor
from exporter.tensors import (
    DTYPES,
    Array,
    ByteRange,
    TensorSpec,
    blocks,
    byte_blocks,
    cast,
    first_difference,
    read,
    same_bits,
    same_values,
)

BF16 = np.dtype(ml_dtypes.bfloat16)
ALL_BF16 = np.arange(1 << 16, dtype=np.uint16)


def f32(*bits: int) -> Array:
    return np.array(bits, np.uint32).view(np.float32)


def bits16(value: Array) -> Array:
    return value.view(np.uint16)


def assert_rounds_like_ml_dtypes(value: Array) -> None:
    got = cast(value, "BF16")
    with np.errstate(invalid="ignore"):  # ml_dtypes reports signalling NaNs
        want = value.astype(BF16)
    number = ~np.isnan(value)
    np.testing.assert_array_equal(bits16(got)[number], bits16(want)[number])
    assert np.isnan(got.astype(np.float32)[~number]).all()
    np.testing.assert_array_equal(np.signbit(got.astype(np.float32)), np.signbit(value))


def test_every_bfloat16_widens_exactly() -> None:
    narrow = ALL_BF16.view(BF16)
    wide = cast(narrow, "F32")
    assert wide.dtype == np.float32
    # The upper half of a float32 is the definition of the format; ml_dtypes may quiet NaNs: it is compared on numbers.
    np.testing.assert_array_equal(wide.view(np.uint32), ALL_BF16.astype(np.uint32) << 16)
    number = ~np.isnan(wide)
    np.testing.assert_array_equal(wide[number], narrow.astype(np.float32)[number])


def test_every_bfloat16_survives_a_round_trip() -> None:
    back = cast(cast(ALL_BF16.view(BF16), "F32"), "BF16")
    wide = cast(ALL_BF16.view(BF16), "F32")
    number = ~np.isnan(wide)
    np.testing.assert_array_equal(bits16(back)[number], ALL_BF16[number])
    assert np.isnan(back.astype(np.float32)[~number]).all()


def test_rounding_at_every_boundary_is_that_of_ml_dtypes() -> None:
    # Every upper half with the lower halves where rounding decides: exact, just below, at and just above the tie.
    lower = np.array([0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF], np.uint32)
    assert_rounds_like_ml_dtypes(((np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] | lower).view(np.float32))


@pytest.mark.parametrize("payload", [0x7F800001, 0xFF800001, 0x7FBFFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000])
def test_no_nan_becomes_a_number_or_infinity(payload: int) -> None:
    assert_rounds_like_ml_dtypes(f32(payload))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_any_float32_rounds_as_ml_dtypes_does(bits: list[int]) -> None:
    assert_rounds_like_ml_dtypes(f32(*bits))


@given(st.floats(width=64, allow_nan=False))
def test_float64_is_rounded_to_bfloat16_once(value: float) -> None:
    got = float(cast(np.array([value]), "BF16")[0])
    with np.errstate(over="ignore"):
        near = np.array([value]).astype(np.float32).astype(BF16).view(np.uint16).astype(np.int64)[0]
    magnitude = [int(near & 0x7FFF) + step for step in (-1, 0, 1)]
    beside = np.array([m for m in magnitude if 0 <= m <= 0x7F7F], np.uint16)
    if abs(value) < float(np.array([0x7F7F], np.uint16).view(BF16)[0]):
        distance = np.abs(beside.view(BF16).astype(np.float64) - abs(value))
        assert abs(abs(got) - abs(value)) == distance.min()


def test_a_float64_just_above_a_tie_is_not_rounded_twice() -> None:
    values = np.array([1 + 2**-8 + 2**-40, 1 + 2**-8, 1 + 3 * 2**-8 - 2**-40, -(1 + 2**-8 + 2**-40), 1e300, -np.inf])
    want = np.array([1 + 2**-7, 1.0, 1 + 2**-7, -(1 + 2**-7), np.inf, -np.inf])
    np.testing.assert_array_equal(cast(values, "BF16").astype(np.float64), want)
    assert np.isnan(cast(np.array([np.nan]), "BF16").astype(np.float64)).all()


def test_float16_overflows_to_infinity_without_a_warning() -> None:
    np.testing.assert_array_equal(cast(np.array([65504, 65520, -1e6], np.float32), "F16"), [65504, np.inf, -np.inf])


def test_a_cast_to_the_same_dtype_is_free() -> None:
    value = np.ones(3, np.float32)
    assert cast(value, "F32") is value


def test_casts_take_views_that_are_not_contiguous() -> None:
    wide = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2]
    narrow = cast(wide, "BF16")
    np.testing.assert_array_equal(narrow.astype(np.float32), wide)
    np.testing.assert_array_equal(cast(narrow[::2], "F32"), wide[::2])


@pytest.mark.parametrize(
    ("shape", "n_rows", "row_nbytes"), [((), 1, 2), ((5,), 5, 2), ((5, 3, 2), 5, 12), ((0, 3), 0, 6), ((3, 0), 3, 0)]
)
def test_a_spec_counts_rows_and_bytes(shape: tuple[int, ...], n_rows: int, row_nbytes: int) -> None:
    spec = TensorSpec("x", "BF16", shape)
    assert (spec.n_rows, spec.row_nbytes, spec.nbytes) == (n_rows, row_nbytes, n_rows * row_nbytes)


@given(st.integers(0, 20), st.integers(0, 5), st.integers(0, 64))
def test_blocks_cover_every_row_once_within_the_budget(n_rows: int, width: int, budget: int) -> None:
    class Counting:
        spec = TensorSpec("x", "I32", (n_rows, width))

        def rows(self, start: int, stop: int) -> Array:
            return np.arange(start * width, stop * width, dtype=np.int32).reshape(stop - start, width)

        def segments(self) -> None: ...

    seen = list(blocks(Counting(), budget))  # type: ignore[arg-type]  # blocks need rows alone
    assert [row for start, block in seen for row in range(start, start + len(block))] == list(range(n_rows))
    assert all(block.nbytes <= max(budget, width * 4) for _, block in seen)
    assert all(len(block) for _, block in seen)


def test_a_scalar_is_read_as_one(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(np.float32(2.5).tobytes())
    value = read(FileTensor(TensorSpec("x", "F32", ()), ByteRange(path, 0, 4)))
    assert value.shape == ()
    assert value == 2.5


def test_the_dtype_table_has_the_sizes_of_the_format() -> None:
    for name, dtype in DTYPES.items():
        digits = "".join(c for c in name.split("_")[0] if c.isdigit()) or "8"
        assert dtype.itemsize * 8 == int(digits)


def stored(folder: Path, name: str, value: Array, dtype: str) -> FileTensor:
    (folder / name).write_bytes(value.tobytes())
    return FileTensor(TensorSpec(name, dtype, value.shape), ByteRange(folder / name, 0, value.nbytes))


def test_values_are_compared_across_dtypes_and_bits_within_one(tmp_path: Path) -> None:
    narrow = np.array([[1.0, -0.0], [0.5, 2.0]], BF16)
    pair = stored(tmp_path, "narrow", narrow, "BF16"), stored(tmp_path, "wide", narrow.astype(np.float32), "F32")
    assert same_values(*pair)
    assert not same_bits(*pair)
    assert first_difference(*pair, 2) is None
    zero = stored(tmp_path, "zero", np.abs(narrow), "BF16")
    assert same_values(pair[0], zero), "-0.0 equals 0.0"
    assert not same_bits(pair[0], zero)
    assert first_difference(pair[0], zero, 2) == 0
    nan = stored(tmp_path, "nan", np.array([[1.0, 2.0], [np.nan, 2.0]], np.float32), "F32")
    assert same_bits(nan, nan)
    assert not same_values(nan, nan)
    assert not same_bits(nan, stored(tmp_path, "short", np.ones((1, 2), np.float32), "F32"))


def test_a_difference_is_found_in_any_block(tmp_path: Path) -> None:
    value = np.zeros((5000, 1024), np.float32)  # more than one block
    base = stored(tmp_path, "base", value, "F32")
    assert same_bits(base, base)
    assert b"".join(byte_blocks(base)) == value.tobytes()
    value[4321, 7] = 1
    other = stored(tmp_path, "other", value, "F32")
    assert first_difference(base, other, 5000) == 4321
    assert first_difference(base, other, 4321) is None
    assert not same_values(base, other)
