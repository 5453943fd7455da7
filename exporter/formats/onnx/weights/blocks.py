"""Rows in blocks of 32 or so small integers, each block with a scale: what MatMulNBits and GatherBlockQuantized read.

The values equal those of ONNX Runtime's own quantiser bit for bit (a test compares them). It is not used here: it takes
whole, transposed matrices, and an export does not wait for ONNX Runtime.
Source: QuantizeBlockwise in onnxruntime's MLAS (q4_dq.cpp), the operator pages of MatMulNBits and
GatherBlockQuantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from exporter.errors import BadInput
from exporter.tensors import Array, Float32, cast

BLOCK: Final = 32


@dataclass(frozen=True, slots=True)
class Blocks:
    """``size`` integers of ``bits`` (4 or 8) to a scale.

    symmetric: they stand around the middle of their range; else around a zero point.

    A value is (code - zero point) * scale; two 4-bit codes share a byte, the first in its lower half.
    """

    bits: int
    symmetric: bool
    size: int = BLOCK

    def codes(self, rows: Array) -> Array:
        """(n, K) → (n, K / size, size * bits / 8) uint8. Raises BadInput for values that are not finite."""
        scaled, zeros = self._scales(rows)
        # A block of zeros has no scale; one so near to zero that its scale has no inverse becomes zeros.
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.float32(1) / scaled
        inverse[np.isinf(inverse)] = 0
        exact = self._in_blocks(rows) * inverse
        exact += zeros
        whole = np.clip(_round(exact), 0, self._top).astype(np.uint8)
        return (whole if self.bits == 8 else _pack(whole)).reshape(len(rows), -1, self.size * self.bits // 8)

    def scales(self, rows: Array, dtype: str) -> Array:
        """(n, K) → (n, K / size) in ``dtype``. Raises BadInput for values beyond it."""
        wide, _ = self._scales(rows)
        stored = cast(wide.reshape(len(rows), -1), dtype)
        if not np.isfinite(stored).all():
            raise BadInput(f"expected finite values whose scale {dtype} can hold, found another")
        return stored

    def zero_points(self, rows: Array) -> Array:
        """(n, K) → (n, ceil(K / size * bits / 8)) uint8, packed like the codes."""
        _, zeros = self._scales(rows)
        whole = zeros.astype(np.uint8).reshape(len(rows), -1)
        if self.bits == 8:
            return whole
        # A half byte that is left over holds the middle, as ONNX Runtime writes it.
        return _pack(np.pad(whole, ((0, 0), (0, whole.shape[1] % 2)), constant_values=8))

    def _in_blocks(self, rows: Array) -> Float32:
        return np.ascontiguousarray(cast(rows, "F32")).reshape(-1, self.size)

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1

    def _scales(self, rows: Array) -> tuple[Float32, Float32]:
        """(scales, zero points), (blocks, 1) each.

        Symmetric: the value furthest from zero becomes the lowest code, so a scale may be negative. Else the range
        from the least to the largest value, stretched to hold zero, is cut into equal steps.
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
        return scale, np.clip(_round(zeros), 0, self._top)


def _round(exact: Float32) -> Float32:
    """To the nearest integer, halves away from zero as C's roundf does; np.rint would take them to the even one."""
    whole = np.trunc(exact)
    rest = exact - whole
    whole += rest >= 0.5
    whole -= rest <= -0.5
    return whole


def _pack(codes: Array) -> Array:
    packed: Array = codes[..., ::2] | codes[..., 1::2] << 4
    return packed
