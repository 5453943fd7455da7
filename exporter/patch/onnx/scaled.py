"""Integers with one scale for a whole matrix, as ONNX Runtime's dynamic quantisation writes them.

Source: the operator page of DequantizeLinear.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from exporter.errors import NotExpressible
from exporter.sources.onnx.file import OnnxFile
from exporter.tensors import BLOCK_BYTES, FLOATS, Array, cast

_INSTEAD: Final = "ttexport merge ADAPTER --to onnx writes the folder anew"
_INTEGERS: Final = ("U8", "I8")


@dataclass(frozen=True)
class Scaled:
    """A value is (integer - zero point) * scale. low, high: the integers that the matrix uses, so that new ones fit."""

    where: str
    dtype: str
    scale: float
    zero_point: int
    low: int
    high: int

    @classmethod
    def of(cls, file: OnnxFile, name: str) -> Scaled | None:
        """How ``file`` scales the matrix ``name``, None if it is no such matrix. Reads it, a block at a time.

        Raises NotExpressible for a scale a token or a column, and for integers other than 8 bits.
        """
        form, where = file.scaled.get(name), f"{file.path}: {name}"
        if form is None:
            return None
        kind = file.initialisers[name].dtype
        told = [file.initialisers[one] for one in (form.scale, form.zero_point) if one is not None]
        single = all(math.prod(one.shape) == 1 for one in told)
        if kind not in _INTEGERS or told[0].dtype not in FLOATS or not single:
            reason = f"{kind} with scales of shape {list(told[0].shape)}: one scale for the whole matrix is understood"
            raise NotExpressible(where, reason, instead=_INSTEAD)
        scale, *zeros = (float(file.rows(one.name, 0, 1).reshape(-1)[0]) for one in told)
        ends = [(int(block.min()), int(block.max())) for block in _blocks(file, name)]
        low, high = min(one for one, _ in ends), max(one for _, one in ends)
        return cls(where, kind, scale, int(zeros[0]) if zeros else 0, low, high)

    def encode(self, rows: Array) -> Array:
        """``rows`` (k, hidden) as integers. Raises NotExpressible for values that the scale was not made for."""
        exact = np.rint(cast(rows, "F32") / np.float32(self.scale)) + self.zero_point
        outside = (exact < self.low) | (exact > self.high)
        if outside.any():
            worst = float(np.abs(rows.astype(np.float32)).max())
            reason = f"one scale serves all tokens, and a trained row reaches {worst:.3g}, beyond what it was made for"
            raise NotExpressible(self.where, reason, instead=_INSTEAD)
        return exact.astype(np.uint8 if self.dtype == "U8" else np.int8)

    def decode(self, integers: Array) -> Array:
        """The numbers, float32."""
        values: Array = (integers.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)
        return values


def _blocks(file: OnnxFile, name: str) -> Iterator[Array]:
    nbytes = file.initialisers[name].nbytes
    kind = np.uint8 if file.initialisers[name].dtype == "U8" else np.int8
    for start in range(0, nbytes, BLOCK_BYTES):
        yield file.raw(name, start, min(start + BLOCK_BYTES, nbytes)).view(kind)
