"""Quantise matrix rows for the ONNX operators MatMulNBits and GatherBlockQuantized, in blocks of 32 values.

A test verifies that the quantised values are bit-identical to the output of ONNX Runtime's quantiser. ONNX Runtime's
quantiser is not called, because it needs whole, transposed matrices, and because an export must work without ONNX
Runtime.
Sources: QuantizeBlockwise in onnxruntime's MLAS (q4_dq.cpp), and ONNX Runtime's documentation of the operators
MatMulNBits and GatherBlockQuantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from exporter.errors import BadInput
from exporter.formats.rounding import round_half_away
from exporter.tensors import Array, Float32, cast

BLOCK: Final = 32


@dataclass(frozen=True, slots=True)
class Blocks:
    """A block quantisation format: each block has ``size`` integers of ``bits`` bits (4 or 8) and a scale.

    A dequantised value is (code - zero point) * scale. symmetric: whether the zero point is always the middle of the
    code range, and is therefore not stored. Two consecutive 4-bit codes share a byte: the first code is in the lower
    half of the byte.
    """

    bits: int
    symmetric: bool
    size: int = BLOCK

    def codes(self, rows: Array) -> Array:
        """Quantise rows (n, width) to packed codes, a uint8 array of shape (n, width / size, size * bits / 8).

        Raises BadInput for NaN or infinity.
        """
        scaled, zeros = self._scales(rows)
        # A block of zeros has scale 0. If a scale is so small that its inverse overflows, the block becomes zeros as
        # well.
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.float32(1) / scaled
        inverse[np.isinf(inverse)] = 0
        exact = self._in_blocks(rows) * inverse
        exact += zeros
        whole = np.clip(round_half_away(exact), 0, self._top).astype(np.uint8)
        return (whole if self.bits == 8 else _pack(whole)).reshape(len(rows), -1, self.size * self.bits // 8)

    def scales(self, rows: Array, dtype: str) -> Array:
        """Return the quantisation scales of rows (n, width), an array of shape (n, width / size).

        Raises BadInput if a scale exceeds the range of ``dtype``.
        """
        wide, _ = self._scales(rows)
        stored = cast(wide.reshape(len(rows), -1), dtype)
        if not np.isfinite(stored).all():
            raise BadInput(f"expected quantisation scales in the range of {dtype}, found a scale out of range")
        return stored

    def zero_points(self, rows: Array) -> Array:
        """Return the zero points of rows (n, width), packed in a uint8 array (n, ceil(width / size * bits / 8))."""
        _, zeros = self._scales(rows)
        whole = zeros.astype(np.uint8).reshape(len(rows), -1)
        if self.bits == 8:
            return whole
        # An unused half byte contains the middle of the code range, as in ONNX Runtime.
        return _pack(np.pad(whole, ((0, 0), (0, whole.shape[1] % 2)), constant_values=8))

    def _in_blocks(self, rows: Array) -> Float32:
        return np.ascontiguousarray(cast(rows, "F32")).reshape(-1, self.size)

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1

    def _scales(self, rows: Array) -> tuple[Float32, Float32]:
        """Compute the scales and zero points of blocks. Returns two arrays of shape (blocks, 1).

        In symmetric quantisation, the block's value furthest from zero is mapped to the lowest code, so a scale may be
        negative. In asymmetric quantisation, the range from the smallest to the largest value of the block, extended to
        contain zero, is divided into equal steps.
        """
        blocks = self._in_blocks(rows)
        low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise BadInput("expected finite values, found NaN or Inf")
        if self.symmetric:
            half = np.float32(1 << (self.bits - 1))
            furthest = np.where(np.abs(high) > np.abs(low), high, low)
            return furthest / -half, np.full_like(low, half)
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = (high - low) / np.float32(self._top)
        with np.errstate(divide="ignore", invalid="ignore"):
            zeros = np.where(scale == 0, low, -low / scale)
        return scale, np.clip(round_half_away(zeros), 0, self._top)


def _pack(codes: Array) -> Array:
    packed: Array = codes[..., ::2] | codes[..., 1::2] << 4
    return packed
