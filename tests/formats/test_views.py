"""Views equal numpy's result on the whole tensor, block by block, and read only the rows that a block needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from exporter.formats.views import Interleaved, Regrouped, Shifted, Stacked, Transposed, row_blocks
from exporter.tensors import BLOCK_BYTES, DTYPES, Array, ByteRange, LazyTensor, TensorSpec


@dataclass(frozen=True)
class Counted:
    """An array as a lazy tensor that records the bytes of each read."""

    value: Array
    dtype: str = "F32"
    reads: list[int] = field(default_factory=list)

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec("w", self.dtype, self.value.shape)

    def rows(self, start: int, stop: int) -> Array:
        assert 0 <= start <= stop <= len(self.value)
        self.reads.append(self.value[start:stop].nbytes)
        return self.value[start:stop]

    def segments(self) -> Iterator[ByteRange | Array]:
        yield self.value


def numbers(*shape: int) -> Array:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def regroup(value: Array) -> Array:
    return value.reshape(4, 3, 6, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)


def interleave(value: Array) -> Array:
    return value.reshape(4, 2, 9, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


CASES: list[tuple[Callable[[LazyTensor], LazyTensor], Callable[[Array], Array]]] = [
    (lambda source: Interleaved(source, 4), interleave),
    (lambda source: Regrouped(source, 4), regroup),
    (lambda source: Shifted(source, 1.0), lambda value: value + 1),
    (lambda source: Stacked([source, source]), lambda value: np.concatenate([value, value])),
]


@pytest.mark.parametrize(("view", "whole"), CASES)
@pytest.mark.parametrize("shape", [(72,), (72, 5)])
def test_rows_of_a_view_equal_those_of_the_whole_tensor(
    view: Callable[[LazyTensor], LazyTensor], whole: Callable[[Array], Array], shape: tuple[int, ...]
) -> None:
    value = numbers(*shape)
    transformed, want = view(Counted(value)), whole(value)
    assert transformed.spec.shape == want.shape
    for start, stop in [(0, 72), (0, 1), (71, 72), (5, 6), (3, 40), (17, 55), (20, 20)]:
        assert np.array_equal(transformed.rows(start, stop), want[start:stop]) or start == stop
    for nbytes in (1, 100, 10**6):
        assert np.array_equal(np.concatenate(list(row_blocks(transformed, nbytes))), want)


def test_a_transposed_matrix_has_columns_as_rows() -> None:
    value = numbers(30, 17)
    transformed = Transposed(Counted(value))
    assert transformed.spec.shape == (17, 30)
    assert np.array_equal(transformed.rows(3, 11), value.T[3:11])
    assert np.array_equal(np.concatenate([np.asarray(part) for part in transformed.segments()]), value.T)


def test_a_large_matrix_is_transposed_in_blocks() -> None:
    source = Counted(np.zeros((3000, 2000), np.float32))
    blocks = [block.nbytes for block in row_blocks(Transposed(source), 1 << 20)]
    assert len(blocks) == 3
    assert max(blocks) <= BLOCK_BYTES
    assert max(source.reads) <= BLOCK_BYTES


def test_heads_are_read_one_block_at_a_time() -> None:
    source = Counted(np.zeros((64 * 32, 256), np.float32))
    assert sum(len(block) for block in row_blocks(Interleaved(source, 32), 100_000)) == 64 * 32
    assert max(source.reads) == 64 * 256 * 4


@pytest.mark.parametrize(("dtype", "out"), [("BF16", "F32"), ("F32", "F32"), ("F16", "F16")])
def test_an_offset_is_added_in_the_dtype_of_llama_cpps_converter(dtype: str, out: str) -> None:
    value = np.array([0.1, 1e-3, -0.7]).astype(DTYPES[dtype])
    transformed = Shifted(Counted(value, dtype), 1.0)
    assert transformed.spec.dtype == out
    wide = value.astype(DTYPES[out])
    assert np.array_equal(transformed.rows(0, 3), wide + wide.dtype.type(1))
    assert transformed.rows(0, 3).dtype == DTYPES[out]
