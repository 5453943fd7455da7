"""Encode tensor rows in ggml's types.

Encoding in F32, F16, BF16 and Q8_0 needs numpy only; encoding in other types needs the gguf package or ggml.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from exporter import ggml
from exporter.errors import BadInput, NotExpressible
from exporter.formats.gguf.quantisation.file_types import NATIVE_FILE_TYPES
from exporter.formats.gguf.quantisation.tensor_types import fits
from exporter.formats.rounding import narrowed, round_half_away
from exporter.tensors import FLOATS, Array, cast

#: Types that need no compiled library, because the gguf package gives bytes identical to ggml's.
_IN_PYTHON: Final = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4"))

_BLOCK: Final = 32


def encode_rows(rows: Array, tensor_type: str) -> Array:
    """Encode ``rows`` (n, width) in any ggml type, into exactly the bytes that llama-quantize writes.

    The result is a uint8 array of shape (n, bytes per row). Raises BadInput if the type cannot represent a value,
    NotExpressible if llama.cpp cannot quantise to the type or if a row does not fill whole blocks of the type, and
    MissingDependency if the type needs llama-cpp-python and the package is not installed.
    """
    if tensor_type in NATIVE_FILE_TYPES or tensor_type in FLOATS:
        return np.ascontiguousarray(encode(rows, tensor_type)).view(np.uint8).reshape(len(rows), -1)
    wide = cast(rows, "F32")
    if tensor_type not in _IN_PYTHON:
        return ggml.quantize_rows(wide, tensor_type)
    if not fits(tensor_type, rows.shape[1]):
        raise NotExpressible(
            f"type {tensor_type}", f"rows of {rows.shape[1]} elements cannot be divided into whole blocks of this type"
        )
    if not np.isfinite(wide).all():
        raise BadInput(f"expected finite values for type {tensor_type}, found NaN or Inf")
    from gguf import GGMLQuantizationType, quants  # importing gguf takes longer than a patch of the common types

    return quants.quantize(wide, GGMLQuantizationType[tensor_type]).view(np.uint8).reshape(len(rows), -1)


def encode(rows: Array, tensor_type: str) -> Array:
    """Encode ``rows`` (n, ...) in F32, F16, BF16 or Q8_0.

    The result is a float array for F32, F16 and BF16, and an array of uint8 blocks for Q8_0. Values are first converted
    to float32, which is exact unless the stored dtype is F64, and then rounded once. Raises BadInput for values that
    the type cannot represent.
    """
    return _q8_0(cast(rows, "F32")) if tensor_type == "Q8_0" else narrowed(rows, tensor_type)


def _q8_0(rows: Array) -> Array:
    """Encode float32 rows (n, width) in Q8_0, as a uint8 array of shape (n, width / 32 * 34).

    A Q8_0 block of 32 values x contains a scale d = max|x| / 127, stored as float16, and the integers round(x * (1 /
    d)). Halves are rounded away from zero. The integers are computed with the float32 value of the scale d, which is
    rounded to float16 only afterwards.
    Source: quantize_row_q8_0_ref in ggml-quants.c.
    """
    blocks = np.ascontiguousarray(rows).reshape(-1, _BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    scale /= np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
        stored = scale.astype(np.float16)
    if not np.isfinite(stored).all() or not np.isfinite(inverse).all():
        raise BadInput("expected finite values in the range of Q8_0, found a value out of range")
    codes = round_half_away(blocks * inverse)
    out = np.empty((len(blocks), 2 + _BLOCK), np.uint8)
    out[:, :2] = stored.view(np.uint8)
    out[:, 2:] = codes.astype(np.int8).view(np.uint8)
    return out.reshape(len(rows), -1)
