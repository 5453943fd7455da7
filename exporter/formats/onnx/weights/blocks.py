"""Block quantisation of rows: 32 small integers share a scale, as MatMulNBits and GatherBlockQuantized read them.

The values equal those of ONNX Runtime's quantiser bit for bit (a test compares them). ONNX Runtime's is not used here:
it takes whole, transposed matrices, and an export does not need ONNX Runtime.
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

    A value is (code - zero point) * scale. symmetric: the zero point is the middle of the range, and is not stored.
    Two 4-bit codes share a byte, the first in its lower half.
    """

    bits: int
    symmetric: bool
    size: int = BLOCK

    def codes(self, rows: Array) -> Array:
        """(n, K) → (n, K / size, size * bits / 8) uint8. Raises BadInput for values that are not finite."""
        scaled, zeros = self._scales(rows)
        # The scale of a block of zeros is 0. A block with a scale too small to have an inverse becomes zeros, too.
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.float32(1) / scaled
        inverse[np.isinf(inverse)] = 0
        exact = self._in_blocks(rows) * inverse
        exact += zeros
        whole = np.clip(round_half_away(exact), 0, self._top).astype(np.uint8)
        return (whole if self.bits == 8 else _pack(whole)).reshape(len(rows), -1, self.size * self.bits // 8)

    def scales(self, rows: Array, dtype: str) -> Array:
        """(n, K) → (n, K / size) in ``dtype``. Raises BadInput for scales beyond its range."""
        wide, _ = self._scales(rows)
        stored = cast(wide.reshape(len(rows), -1), dtype)
        if not np.isfinite(stored).all():
            raise BadInput(f"expected finite values with scales that {dtype} can hold, found another")
        return stored

    def zero_points(self, rows: Array) -> Array:
        """(n, K) → (n, ceil(K / size * bits / 8)) uint8, packed like the codes."""
        _, zeros = self._scales(rows)
        whole = zeros.astype(np.uint8).reshape(len(rows), -1)
        if self.bits == 8:
            return whole
        # An unused half byte holds the middle of the range, as ONNX Runtime writes it.
        return _pack(np.pad(whole, ((0, 0), (0, whole.shape[1] % 2)), constant_values=8))

    def _in_blocks(self, rows: Array) -> Float32:
        return np.ascontiguousarray(cast(rows, "F32")).reshape(-1, self.size)

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1

    def _scales(self, rows: Array) -> tuple[Float32, Float32]:
        """(scales, zero points), (blocks, 1) each.

        Symmetric: the value furthest from zero becomes the lowest code, so a scale may be negative. Else the range
        from the least to the largest value, extended to contain zero, is divided into equal steps.
        """
        blocks = self._in_blocks(rows)
        low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise BadInput("expected finite values, found another")
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
