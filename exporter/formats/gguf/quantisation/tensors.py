"""Row blocks in ggml's types: F32, F16, BF16 and Q8_0 natively, a few more by the gguf package, the rest by ggml."""

from __future__ import annotations

from typing import Final

import numpy as np

from exporter import ggml
from exporter.errors import BadInput, NotExpressible
from exporter.formats.gguf.quantisation.file_types import NATIVE_FILE_TYPES
from exporter.tensors import DTYPES, FLOATS, Array, cast

#: Types that the gguf package quantises to the bit as ggml does, so that no compiled library is needed for them.
_IN_PYTHON: Final = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4"))

_BLOCK: Final = 32


def encode_rows(rows: Array, kind: str) -> Array:
    """``rows`` (n, width) in any ggml type: (n, bytes a row) uint8, the bytes that llama-quantize writes.

    Raises BadInput for values that the type cannot hold, NotExpressible for a type that rows are not quantised to,
    MissingDependency where it takes llama.cpp and llama-cpp-python is not installed.
    """
    if kind in NATIVE_FILE_TYPES or kind in FLOATS:
        return np.ascontiguousarray(encode(rows, kind)).view(np.uint8).reshape(len(rows), -1)
    wide = cast(rows, "F32")
    if kind not in _IN_PYTHON:
        return ggml.quantize_rows(wide, kind)
    if not np.isfinite(wide).all():
        raise BadInput(f"expected finite values for type {kind}, found NaN or Inf")
    from gguf import GGMLQuantizationType, QuantError, quants  # costs more than a patch of the common types

    try:
        out = quants.quantize(wide, GGMLQuantizationType[kind])
    except QuantError as exc:
        raise NotExpressible(f"type {kind}", f"rows of {rows.shape[1]} elements do not fill its blocks") from exc
    return out.view(np.uint8).reshape(len(rows), -1)


def encode(rows: Array, kind: str) -> Array:
    """``rows`` (n, ...) in the type ``kind``: an array of that dtype, or uint8 blocks for Q8_0.

    Values are rounded once, from the stored dtype by way of float32, which holds every stored value exactly but F64's.
    Raises BadInput for values that the type cannot hold.
    """
    if kind == "Q8_0":
        return _q8_0(cast(rows, "F32"))
    if rows.dtype == DTYPES[kind]:
        return rows
    with np.errstate(over="ignore"):
        out = cast(cast(rows, "F32"), kind)
    if kind == "F16" and not np.isfinite(out).all():
        raise BadInput("expected finite values that F16 can hold (up to 65504), found another")
    return out


def _q8_0(rows: Array) -> Array:
    """(n, width) float32 → (n, width / 32 * 34) uint8.

    Source: quantize_row_q8_0_ref in ggml-quants.c: per 32 values d = max|x| / 127, stored as float16, and
    round(x * (1 / d)), halves away from zero, with d still float32.
    """
    blocks = np.ascontiguousarray(rows).reshape(-1, _BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    scale /= np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
        stored = scale.astype(np.float16)
    if not np.isfinite(stored).all() or not np.isfinite(inverse).all():
        raise BadInput("expected finite values in the range of Q8_0, found another")
    exact = blocks * inverse
    # np.rint would take halves to the even number; the C function takes them away from zero. exact - whole is exact.
    whole = np.trunc(exact)
    exact -= whole
    whole += exact >= 0.5
    whole -= exact <= -0.5
    out = np.empty((len(blocks), 2 + _BLOCK), np.uint8)
    out[:, :2] = stored.view(np.uint8)
    out[:, 2:] = whole.astype(np.int8).view(np.uint8)
    return out.reshape(len(rows), -1)
