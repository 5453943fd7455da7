"""Defines lazy tensors: the name, dtype and shape are known immediately, and the bytes are read on demand.

The planning of a merge uses only the name, dtype and shape (``TensorSpec``) and therefore reads no tensor bytes.
Writers read blocks of rows through ``LazyTensor``. All arrays are numpy arrays, not torch tensors. Dtypes that numpy
lacks, such as bfloat16, come from the package ml_dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

#: Name of a dtype in safetensors → numpy dtype. Source: the dtype list of the safetensors format.
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

#: Dtypes that a merge or a cast accepts. Tensors of any other dtype are copied unchanged or refused.
FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})

#: Rows are read and written in blocks of about this size. A block of this size is large enough that the cost of a call
#: is negligible, and small enough that several blocks fit into the smallest memory limit (120 MB per process).
BLOCK_BYTES: Final = 8 << 20

#: Number of bytes hashed at a time. Memory of this size is reused from block to block; a larger block would be
#: allocated anew each time.
_HASHED_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a tensor, without the tensor's bytes. dtype: a safetensors dtype name, such as BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return DTYPES[self.dtype].itemsize

    @property
    def n_rows(self) -> int:
        """Length of the first axis of the tensor, or 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_nbytes(self) -> int:
        """Size in bytes of one row of the tensor, which is the slice at one index of the first axis."""
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor in bytes."""
        return self.n_rows * self.row_nbytes


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A range of bytes in a file. The offset ``offset_bytes`` counts from the start of the file."""

    path: Path
    offset_bytes: int
    nbytes: int


class LazyTensor(Protocol):
    """A tensor whose rows are read on demand."""

    @property
    def spec(self) -> TensorSpec:
        """Return the name, the dtype and the shape of the tensor that ``rows`` reads."""

    def rows(self, start: int, stop: int) -> Array:
        """Read the rows [start, stop) along the first axis of the tensor."""

    def segments(self) -> Iterator[ByteRange | Array]:
        """Yield the bytes of the tensor from first to last.

        Bytes that can be copied unchanged from a file are yielded as byte ranges, and all other bytes as arrays.
        """


def read(tensor: LazyTensor) -> Array:
    """Read the whole tensor. Peak memory: one copy of the tensor."""
    return tensor.rows(0, tensor.spec.n_rows).reshape(tensor.spec.shape)


def blocks(tensor: LazyTensor, block_nbytes: int = BLOCK_BYTES) -> Iterator[tuple[int, Array]]:
    """Yield (start row, rows) for each block of consecutive rows, from first to last.

    A block contains at most ``block_nbytes`` bytes, but at least one row.
    """
    spec = tensor.spec
    step = max(1, block_nbytes // max(1, spec.row_nbytes))
    for start in range(0, spec.n_rows, step):
        yield start, tensor.rows(start, min(start + step, spec.n_rows))


def byte_blocks(tensor: LazyTensor) -> Iterator[memoryview]:
    """Yield the tensor's bytes in order, in blocks of ``_HASHED_BYTES`` bytes, for hashing."""
    for _, rows in blocks(tensor, _HASHED_BYTES):
        yield as_bytes(rows)


def as_bytes(value: Array) -> memoryview:
    """Return the bytes of ``value`` in C order, without copying if ``value`` is contiguous."""
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def same_values(first: LazyTensor, second: LazyTensor) -> bool:
    """Whether two tensors have equal shapes and equal values; their dtypes may differ. NaN equals no value.

    Peak memory: one block of each tensor.
    """
    if first.spec.shape != second.spec.shape:
        return False
    return all(np.array_equal(left, right) for _, left, right in _block_pairs(first, second, first.spec.n_rows))


def same_bits(first: LazyTensor, second: LazyTensor) -> bool:
    """Whether two tensors have equal dtypes, equal shapes and equal bytes. Peak memory: one block of each tensor."""
    if (first.spec.dtype, first.spec.shape) != (second.spec.dtype, second.spec.shape):
        return False
    return first_difference(first, second, first.spec.n_rows) is None


def first_difference(first: LazyTensor, second: LazyTensor, n_rows: int) -> int | None:
    """Index of the first row in which two tensors differ, or None if the first ``n_rows`` rows are all equal.

    If the dtypes differ, the rows are cast to the wider dtype and then compared bit by bit. The two tensors must have
    rows of equal shape. Peak memory: one block of each tensor.
    """
    for start, left, right in _block_pairs(first, second, n_rows):
        dtype = np.promote_types(left.dtype, right.dtype)
        bits, other_bits = (_bits(rows.astype(dtype, copy=False)) for rows in (left, right))
        if not np.array_equal(bits, other_bits):
            return start + int(np.flatnonzero((bits != other_bits).reshape(len(left), -1).any(axis=1))[0])
    return None


def _bits(value: Array) -> Array:
    return np.ascontiguousarray(value).view(np.uint8)


def _block_pairs(first: LazyTensor, second: LazyTensor, n_rows: int) -> Iterator[tuple[int, Array, Array]]:
    """Yield (start row, rows of ``first``, rows of ``second``) for each block of the first ``n_rows`` rows."""
    step = max(1, BLOCK_BYTES // max(1, first.spec.row_nbytes, second.spec.row_nbytes))
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        yield start, first.rows(start, stop), second.rows(start, stop)


def cast(value: Array, dtype: str) -> Array:
    """Cast the array ``value`` to ``dtype``, rounding once to nearest even.

    Returns ``value`` itself if ``value`` already has the dtype ``dtype``.

    Casts between float32 and bfloat16 shift the bits, because bfloat16 is the upper half of an IEEE binary32 number.
    Shifting the bits is several times faster than the cast of ml_dtypes. A NaN in ``value`` stays a NaN and keeps its
    sign.
    """
    target = DTYPES[dtype]
    if value.dtype == target:
        return value
    if value.dtype == DTYPES["BF16"] and dtype == "F32":
        wide = np.left_shift(value.view(np.uint16), np.uint32(16), dtype=np.uint32)
        return wide.view(np.float32)
    if value.dtype == DTYPES["F64"] and dtype == "BF16":
        value = _to_odd_f32(value)
    if value.dtype == DTYPES["F32"] and dtype == "BF16":
        return _round_to_bf16(value)
    # A float16 target overflows to inf, and a signalling NaN becomes quiet; finiteness checks report both.
    with np.errstate(over="ignore", invalid="ignore"):
        return value.astype(target)


def _to_odd_f32(value: Array) -> Array:
    """Cast float64 to float32 with rounding to odd, which sets the last bit of every inexact result to 1.

    Rounding the float32 result to a narrower dtype then gives the same value as rounding the float64 value directly.

    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd".
    """
    with np.errstate(over="ignore", invalid="ignore"):
        near = value.astype(np.float32)
    bits = near.view(np.uint32)
    wide = near.astype(np.float64)
    bits -= np.abs(wide) > np.abs(value)  # truncate: one step towards zero, infinity to the largest float
    bits |= (wide != value) & ~np.isnan(value)
    return near


def _round_to_bf16(value: Array) -> Array:
    bits = np.ascontiguousarray(value).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    out = (rounded >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(value)
    if nan.any():
        # The rounding bias may carry the payload of a NaN into infinity, so the quiet bit is set instead.
        out[nan] = ((bits[nan] >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
    return out.view(DTYPES["BF16"])
