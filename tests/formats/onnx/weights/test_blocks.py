"""Block quantisation: the same bits as ONNX Runtime's quantiser, and refusals of values that it cannot represent."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.errors import BadInput
from exporter.formats.onnx.weights.blocks import BLOCK, Blocks
from exporter.tensors import Array
from exporter.verify.stored.onnx_blocks import BlockStorage

FORMS = [Blocks(bits, symmetric) for bits in (4, 8) for symmetric in (True, False)]


def rows() -> Array:
    """A row for each special case of a block: zeros, a single sign, halves between steps, huge and equal values."""
    values = np.random.default_rng(0).normal(size=(64, 5 * BLOCK)).astype(np.float32)
    values[0] = 0
    values[1], values[2] = np.abs(values[1]), -np.abs(values[2])
    values[3] = np.random.default_rng(1).integers(-16, 16, values.shape[1]) / 2
    values[4, ::2], values[4, 1::2] = 7, -7
    values[5] *= np.float32(1e-30)
    values[6] *= np.float32(1e36)
    values[7] = 3
    values[8:16] = values[8:16].astype(np.float16)
    return values


@pytest.mark.models
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_codes_scales_and_zero_points_are_those_of_onnx_runtime(form: Blocks, dtype: str) -> None:
    values = rows() if dtype == "F32" else np.delete(rows(), 6, axis=0)  # no float16 scale for 1e36
    ours = [form.codes(values), form.scales(values, dtype)]
    if not form.symmetric:
        ours.append(form.zero_points(values))
    theirs = BlockStorage(form.bits, BLOCK, not form.symmetric, dtype).encode(values)
    assert np.array_equal(np.concatenate([part.view(np.uint8).reshape(len(values), -1) for part in ours], 1), theirs)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(form: Blocks) -> None:
    values = rows()
    assert np.array_equal(form.codes(values)[9:11], form.codes(values[9:11]))
    assert np.array_equal(form.scales(values, "F32")[9:11], form.scales(values[9:11], "F32"))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(form: Blocks, value: float) -> None:
    values = rows()
    values[20, 3] = value
    with pytest.raises(BadInput, match="finite"):
        form.codes(values)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_block_of_numbers_too_small_to_scale_becomes_zeros(form: Blocks) -> None:
    tiny, zeros = np.full((1, BLOCK), 1e-42, np.float32), np.zeros((1, BLOCK), np.float32)
    tiny[0, 0] = 0
    assert np.array_equal(form.codes(tiny), form.codes(zeros))


def test_scale_beyond_float16_is_refused() -> None:
    with pytest.raises(BadInput, match="F16"):
        FORMS[0].scales(rows(), "F16")
