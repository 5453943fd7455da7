"""Rows in blocks of integers as ONNX Runtime's own quantiser makes them: the checker's account of int8 and int4."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from exporter.tensors import DTYPES, Array, cast

if TYPE_CHECKING:
    from exporter.sources.onnx import OnnxFile

_KIND: Final = re.compile(r"int(4|8) x (\d+)( with zero points)?, scales (F32|F16)")


@dataclass(frozen=True, slots=True)
class BlockKind:
    """Integers of ``bits``, ``size`` to a scale of dtype ``scales``; around a zero point each, or around the middle."""

    bits: int
    size: int
    zero_points: bool
    scales: str

    def __str__(self) -> str:
        zeros = " with zero points" if self.zero_points else ""
        return f"int{self.bits} x {self.size}{zeros}, scales {self.scales}"

    @staticmethod
    def is_one(kind: str) -> bool:
        """Whether ``kind`` names such a storage."""
        return _KIND.fullmatch(kind) is not None

    @classmethod
    def read(cls, kind: str) -> Self:
        """The storage that ``str`` wrote."""
        found = _KIND.fullmatch(kind)
        assert found, kind
        return cls(int(found[1]), int(found[2]), bool(found[3]), found[4])

    @classmethod
    def of(cls, file: OnnxFile, name: str) -> Self:
        """How ``file`` stores the matrix ``name``."""
        form = file.blocks[name]
        return cls(form.bits, form.size, form.zero_points is not None, file.initialisers[form.scales].dtype)

    def encode(self, rows: Array) -> Array:
        """``rows`` (n, hidden) as codes, scales and zero points side by side: (n, bytes) uint8."""
        from onnxruntime.capi import _pybind_state as runtime

        quantise = {4: runtime.quantize_matmul_4bits, 8: runtime.quantize_matmul_8bits}[self.bits]
        count, width = rows.shape
        per_row = -(-width // self.size)
        codes = np.zeros((count, per_row, self.size * self.bits // 8), np.uint8)
        scales = np.zeros(count * per_row, np.float32)
        zeros = np.zeros((count, -(-per_row * self.bits // 8)), np.uint8)
        # It wants the matrix transposed, (in, out).
        columns = np.ascontiguousarray(cast(rows, "F32").T)
        quantise(codes, columns, scales, zeros.reshape(-1), self.size, count, width, not self.zero_points)
        stored = cast(scales, self.scales).reshape(count, per_row).view(np.uint8)
        return np.concatenate([codes.reshape(count, -1), stored, *([zeros] if self.zero_points else [])], axis=1)

    def decode(self, raw: Array) -> Array:
        """The numbers that ``encode`` stored as ``raw``: (n, hidden) float64.

        Source: ONNX Runtime's operator page of MatMulNBits; two 4-bit codes share a byte, the first in the lower half.
        """
        count, per_block = len(raw), self.size * self.bits // 8
        scale_bytes = DTYPES[self.scales].itemsize
        zero_bits = self.bits if self.zero_points else 0
        # A row has so many blocks that codes, scales and zero points, these rounded up to a byte, fill it.
        blocks = raw.shape[1] * 8 // (8 * (per_block + scale_bytes) + zero_bits)
        codes, rest = np.split(np.ascontiguousarray(raw), [blocks * per_block], axis=1)
        scales, zeros = np.split(rest, [blocks * scale_bytes], axis=1)
        wide = np.ascontiguousarray(scales).view(DTYPES[self.scales]).astype(np.float64)
        middle = self._numbers(zeros)[:, :blocks] if self.zero_points else np.full((count, 1), 1 << (self.bits - 1))
        values = self._numbers(codes).reshape(count, blocks, self.size).astype(np.float64)
        result: Array = ((values - middle[..., None]) * wide[..., None]).reshape(count, -1)
        return result

    def _numbers(self, packed: Array) -> Array:
        if self.bits == 8:
            return packed.astype(np.int64)
        return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1).astype(np.int64)
