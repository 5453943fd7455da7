"""Encode, decode and compare matrix rows in ONNX Runtime's block-quantised int4 and int8 layouts.

Blocks are encoded and decoded without the exporter's quantisation code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from exporter.tensors import DTYPES, Array, cast

if TYPE_CHECKING:
    from exporter.sources.onnx.file import OnnxFile

_NAME: Final = re.compile(r"int(4|8) x (\d+)( with zero points)?, scales (F32|F16)")

#: Largest distance of a value from a correct code. No other code may be nearer, but float32 arithmetic may round a
#: value halfway between two codes up or down.
HALF_STEP: Final = 0.5 + 1e-4


@dataclass(frozen=True, slots=True)
class BlockStorage:
    """A quantisation type with blocks of ``size`` integers, where each integer has ``bits`` bits.

    zero_points: True if a zero point is stored for each block, and False if the middle of the integer range represents
    zero. scales: the dtype of the scales, one per block.
    """

    bits: int
    size: int
    zero_points: bool
    scales: str

    def __str__(self) -> str:
        zeros = " with zero points" if self.zero_points else ""
        return f"int{self.bits} x {self.size}{zeros}, scales {self.scales}"

    @staticmethod
    def is_name(storage: str) -> bool:
        """Whether ``storage`` is the name of a block quantisation type."""
        return _NAME.fullmatch(storage) is not None

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the block quantisation type with the given name.

        The name must have the form that ``str`` returns for a block quantisation type.
        """
        match = _NAME.fullmatch(name)
        assert match, name
        return cls(int(match[1]), int(match[2]), bool(match[3]), match[4])

    @classmethod
    def of(cls, file: OnnxFile, name: str) -> Self:
        """Return the block quantisation type of the matrix ``name`` in ``file``."""
        blocks = file.blocks[name]
        return cls(blocks.bits, blocks.size, blocks.zero_points is not None, file.initialisers[blocks.scales].dtype)

    def encode(self, rows: Array) -> Array:
        """Quantise ``rows`` (n, hidden), and return the bytes of codes, scales and zero points as (n, bytes) uint8."""
        from onnxruntime.capi import _pybind_state as runtime

        quantise = {4: runtime.quantize_matmul_4bits, 8: runtime.quantize_matmul_8bits}[self.bits]
        count, width = rows.shape
        per_row = -(-width // self.size)
        codes = np.zeros((count, per_row, self.size * self.bits // 8), np.uint8)
        scales = np.zeros(count * per_row, np.float32)
        zeros = np.zeros((count, -(-per_row * self.bits // 8)), np.uint8)
        # The quantiser expects the transposed matrix, (in, out).
        columns = np.ascontiguousarray(cast(rows, "F32").T)
        quantise(codes, columns, scales, zeros.reshape(-1), self.size, count, width, not self.zero_points)
        stored = cast(scales, self.scales).reshape(count, per_row).view(np.uint8)
        return np.concatenate([codes.reshape(count, -1), stored, *([zeros] if self.zero_points else [])], axis=1)

    def holds(self, rows: Array, raw: Array) -> Array:
        """Return an array (n,) that is True at i if the stored bytes ``raw[i]`` correctly quantise ``rows[i]``.

        A quantisation of a row is correct if the scales and zero points equal the values computed from the row, and
        every element is rounded to the nearest integer code. The method ``holds`` does not need ONNX Runtime.
        """
        codes, scales, zeros = self._split(raw)
        values = cast(rows, "F32").reshape(len(rows), -1, self.size)
        low, high = values.min(axis=2), values.max(axis=2)
        top = (1 << self.bits) - 1
        middle = np.full(low.shape, 1 << (self.bits - 1), np.float64)
        if self.zero_points:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
            step = (high - low) / np.float32(top)
            steps_below = -low.astype(np.float64) / np.where(step == 0, 1, step)
            middle = self._numbers(zeros)[:, : low.shape[1]].astype(np.float64)
            correct = np.abs(middle - np.clip(steps_below, 0, top)) <= HALF_STEP
        else:
            step = np.where(np.abs(high) > np.abs(low), high, low) / np.float32(-(1 << (self.bits - 1)))
            correct = np.ones(low.shape, np.bool_)
        correct &= cast(step, self.scales) == scales
        exact = values.astype(np.float64) / np.where(step == 0, 1, step)[..., None] + middle[..., None]
        numbers = self._numbers(codes).reshape(values.shape)
        correct &= (np.abs(numbers - np.clip(exact, 0, top)) <= HALF_STEP).all(axis=2)
        result: Array = correct.all(axis=1)
        return result

    def decode(self, raw: Array) -> Array:
        """Dequantise the bytes of rows that ``encode`` quantised, and return a float64 array (n, hidden).

        In 4-bit storage, each byte contains two quantised integers, and the lower half of the byte contains the first
        integer. Source: ONNX Runtime's documentation of the operator MatMulNBits.
        """
        count = len(raw)
        codes, scales, zeros = self._split(raw)
        blocks = scales.shape[1]
        wide = scales.astype(np.float64)
        middle = self._numbers(zeros)[:, :blocks] if self.zero_points else np.full((count, 1), 1 << (self.bits - 1))
        values = self._numbers(codes).reshape(count, blocks, self.size).astype(np.float64)
        result: Array = ((values - middle[..., None]) * wide[..., None]).reshape(count, -1)
        return result

    def _split(self, raw: Array) -> tuple[Array, Array, Array]:
        """Split the bytes of each row into codes (n, bytes), scales (n, blocks) and zero points (n, bytes)."""
        per_block = self.size * self.bits // 8
        scale_bytes = DTYPES[self.scales].itemsize
        zero_bits = self.bits if self.zero_points else 0
        # Codes, scales and zero points (rounded up to a byte) of all blocks fill a row.
        blocks = raw.shape[1] * 8 // (8 * (per_block + scale_bytes) + zero_bits)
        codes, rest = np.split(np.ascontiguousarray(raw), [blocks * per_block], axis=1)
        scales, zeros = np.split(rest, [blocks * scale_bytes], axis=1)
        return codes, np.ascontiguousarray(scales).view(DTYPES[self.scales]), zeros

    def _numbers(self, packed: Array) -> Array:
        if self.bits == 8:
            return packed.astype(np.int64)
        return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1).astype(np.int64)
