"""Block quantisation of rows for MatMulNBits and GatherBlockQuantized: 32 small integers share a scale.

The quantised values are bit-identical to the output of ONNX Runtime's quantiser (a test compares them). ONNX Runtime's
quantiser is not used, because ONNX Runtime needs whole, transposed matrices, and is not a dependency of an export.
Source: QuantizeBlockwise in onnxruntime's MLAS (q4_dq.cpp), the operator pages of MatMulNBits and
GatherBlockQuantized.
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
    """Blocks of ``size`` integers of ``bits`` (4 or 8), each block with a scale.

    A value is (code - zero point) * scale. symmetric: the zero point is the middle of the code range, and is not
    stored. Two 4-bit codes share a byte, the first in its lower half.
    """

    bits: int
    symmetric: bool
    size: int = BLOCK

    def codes(self, rows: Array) -> Array:
        """Codes of rows (n, K): (n, K / size, size * bits / 8) uint8. Raises BadInput for NaN and infinite values."""
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
        """Scales of rows (n, K): (n, K / size) in ``dtype``. Raises BadInput for scales out of range of ``dtype``."""
        wide, _ = self._scales(rows)
        stored = cast(wide.reshape(len(rows), -1), dtype)
        if not np.isfinite(stored).all():
            raise BadInput(f"expected finite values with scales in the range of {dtype}, found a scale out of range")
        return stored

    def zero_points(self, rows: Array) -> Array:
        """Zero points of rows (n, K): (n, ceil(K / size * bits / 8)) uint8, packed like the codes."""
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
        """Compute (scales, zero points) of blocks, each array of shape (blocks, 1).

        If symmetric, the value furthest from zero becomes the lowest code, so a scale may be negative. If not
        symmetric, the range from the smallest to the largest value, extended to contain zero, is divided into equal
        steps.
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
