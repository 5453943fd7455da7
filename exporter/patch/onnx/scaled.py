"""Encodes rows for a matrix with a single quantisation scale, as in ONNX Runtime's dynamic quantisation.

Source: the ONNX operator documentation of DequantizeLinear.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from exporter.patch.onnx.refusal import refusal
from exporter.sources.onnx.file import OnnxFile
from exporter.tensors import BLOCK_BYTES, FLOATS, Array, cast

_INTEGERS: Final = ("U8", "I8")


@dataclass(frozen=True)
class Scaled:
    """Quantisation with one scale per matrix: value = (integer - zero point) * scale.

    low, high: smallest and largest integer in the stored matrix; the integers of new rows must be in this range.
    """

    where: str
    dtype: str
    scale: float
    zero_point: int
    low: int
    high: int

    @classmethod
    def of(cls, file: OnnxFile, name: str) -> Scaled | None:
        """Return the quantisation of the matrix ``name`` in ``file``, or None for a matrix without a scale.

        The function reads the whole matrix in blocks, to find the smallest and the largest integer. Raises
        NotExpressible if the matrix has a scale per token or per column, or is not quantised to 8 bits.
        """
        form, where = file.scaled.get(name), f"{file.path}: {name}"
        if form is None:
            return None
        dtype = file.initialisers[name].dtype
        scale, *zero_points = (file.initialisers[part] for part in (form.scale, form.zero_point) if part is not None)
        single = all(math.prod(part.shape) == 1 for part in (scale, *zero_points))
        if dtype not in _INTEGERS or scale.dtype not in FLOATS or not single:
            shape = list(scale.shape)
            raise refusal(
                where,
                f"expected an 8-bit matrix with a single scale, found {dtype} values with scales of shape {shape}",
            )
        factor, *zeros = (float(file.rows(part.name, 0, 1).reshape(-1)[0]) for part in (scale, *zero_points))
        ranges = [(int(block.min()), int(block.max())) for block in _blocks(file, name)]
        low, high = min(least for least, _ in ranges), max(most for _, most in ranges)
        return cls(where, dtype, factor, int(zeros[0]) if zeros else 0, low, high)

    def encode(self, rows: Array) -> Array:
        """Quantise ``rows``, an array (number of rows, hidden size), to integers.

        Raises NotExpressible if a quantised value is outside the range from ``low`` to ``high``.
        """
        exact = np.rint(cast(rows, "F32") / np.float32(self.scale)) + self.zero_point
        outside = (exact < self.low) | (exact > self.high)
        if outside.any():
            largest = float(np.abs(rows.astype(np.float32)).max())
            raise refusal(
                self.where,
                f"the value {largest:.3g} of a new row exceeds the range of the matrix, "
                "in which all tokens share one scale",
            )
        return exact.astype(np.uint8 if self.dtype == "U8" else np.int8)

    def decode(self, integers: Array) -> Array:
        """Dequantise ``integers`` to a float32 array of equal shape."""
        values: Array = (integers.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)
        return values


def _blocks(file: OnnxFile, name: str) -> Iterator[Array]:
    nbytes = file.initialisers[name].nbytes
    dtype = np.uint8 if file.initialisers[name].dtype == "U8" else np.int8
    for start in range(0, nbytes, BLOCK_BYTES):
        yield file.raw(name, start, min(start + BLOCK_BYTES, nbytes)).view(dtype)
