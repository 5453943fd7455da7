from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from exporter.errors import BadInput
from exporter.formats.gguf.quantisation.file_types import NATIVE_FILE_TYPES
from exporter.formats.gguf.quantisation.tensors import encode
from exporter.tensors import Array

# Values up to this have a scale within float16's range; the type cannot hold rows with much larger values.
FINITE = st.floats(min_value=-1e6, max_value=1e6, width=32, allow_subnormal=False)


def bytes_of(rows: Array) -> bytes:
    return np.ascontiguousarray(rows).tobytes()


@given(arrays.arrays(np.float32, (3, 64), elements=FINITE))
@settings(max_examples=200, deadline=None)
def test_q8_0_equals_gguf_pys_for_any_numbers(rows: Array) -> None:
    # Scales below float16's range make 1/d overflow: refused here, infinity times zero there.
    scales = np.abs(rows.reshape(-1, 32)).max(axis=1) / 127
    rows = np.where(np.repeat((scales > 0) & (scales < 1e-30), 32).reshape(rows.shape), np.float32(0), rows)
    want = quants.quantize(rows, GGMLQuantizationType.Q8_0)
    assert bytes_of(encode(rows, "Q8_0")) == bytes_of(want)


def test_q8_0_takes_exact_halves_away_from_zero() -> None:
    # With the largest value 127 the scale is 1, and every half is a tie.
    row = np.array([[127, 0.5, -0.5, 1.5, -1.5, 2.5, 0.49999997, -126.5, *([0] * 24)]], np.float32)
    out = encode(row, "Q8_0")[0, 2:].view(np.int8)
    assert out[:8].tolist() == [127, 1, -1, 2, -2, 3, 0, -127]


def test_zero_block_stays_zero() -> None:
    assert not encode(np.zeros((2, 32), np.float32), "Q8_0").any()


@pytest.mark.parametrize("tensor_type", ["F16", "BF16"])
def test_sixteen_bit_types_equal_gguf_pys(tensor_type: str) -> None:
    rows = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32) * np.float32(3)
    assert bytes_of(encode(rows, tensor_type)) == bytes_of(quants.quantize(rows, GGMLQuantizationType[tensor_type]))


def test_infinite_value_does_not_fit_f16() -> None:
    with pytest.raises(BadInput, match="F16"):
        encode(np.array([[1e5]], np.float32), "F16")


def test_file_types_are_llama_cpps() -> None:
    for name, number in NATIVE_FILE_TYPES.items():
        file_type = gguf.LlamaFileType(number).name
        assert file_type == ("ALL_F32" if name == "F32" else f"MOSTLY_{name}")
