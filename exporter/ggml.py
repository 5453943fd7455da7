"""Quantises tensor rows with the ggml library inside llama-cpp-python.

The ggml library is loaded on first use.

For most quantised types, only the ggml library produces the exact bytes that llama.cpp writes, because the bytes depend
on the order of operations in the C code.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Final

import numpy as np

from exporter.errors import BadInput, NotExpressible
from exporter.packages import LLAMA_CPP
from exporter.sources.gguf.types import TENSOR_TYPES, TYPE_NUMBERS
from exporter.tensors import Array

#: Types that ggml_quantize_chunk supports. For any other type, ggml_quantize_chunk ends the process.
_SUPPORTED: Final = frozenset({
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0",
    "TQ2_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4",
    "Q1_0", "Q2_0",
})  # fmt: skip
_SUFFIX: Final = ".dylib" if sys.platform == "darwin" else ".so"


def quantize_rows(rows: Array, ggml_type: str) -> Array:
    """Quantise ``rows``, a float32 array (n, width), to ``ggml_type``.

    Returns a uint8 array (n, bytes per row) with the bytes that llama-quantize writes.

    Rows are quantised without an importance matrix, because llama.cpp also quantises token_embd.weight and
    output.weight without an importance matrix. Raises MissingDependency if llama-cpp-python is not installed. Raises
    NotExpressible if ggml cannot quantise to ``ggml_type``, if ``ggml_type`` needs an importance matrix, or if the
    width of the rows is not a multiple of the block size. Raises BadInput if a value is outside the range of
    ``ggml_type``.
    """
    if ggml_type not in _SUPPORTED:
        raise NotExpressible(f"type {ggml_type}", "llama.cpp does not quantise to this type")
    number = TYPE_NUMBERS[ggml_type]
    _, block, block_nbytes = TENSOR_TYPES[number]
    n, width = rows.shape
    if width % block:
        raise NotExpressible(
            f"type {ggml_type}", f"rows of {width} elements cannot be divided into blocks of {block} elements"
        )
    library = _library(ggml_type)
    if library.ggml_quantize_requires_imatrix(number):
        raise NotExpressible(
            f"type {ggml_type}",
            "this type needs an importance matrix, but llama.cpp quantises token rows without an importance matrix",
        )
    source = np.ascontiguousarray(rows, np.float32)
    if not np.isfinite(source).all():
        raise BadInput(f"expected finite values for type {ggml_type}, found NaN or Inf")
    out = np.empty((n, width // block * block_nbytes), np.uint8)
    if n:
        done = library.ggml_quantize_chunk(number, source.ctypes.data, out.ctypes.data, 0, n, width, None)
        if done != out.nbytes or not library.ggml_validate_row_data(number, out.ctypes.data, out.nbytes):
            raise BadInput(f"expected values in the range of type {ggml_type}, found values outside of the range")
    return out


@cache
def _library(ggml_type: str) -> ctypes.CDLL:
    folder = LLAMA_CPP.folder()
    if folder is None:
        raise LLAMA_CPP.missing(f"type {ggml_type}")
    # Loads only the library, because importing the Python package would initialise every backend first.
    path = folder / "lib" / f"libggml-base{_SUFFIX}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as exc:
        raise LLAMA_CPP.missing(f"type {ggml_type}") from exc
    size, number = ctypes.c_size_t, ctypes.c_int
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.restype = size
    library.ggml_quantize_chunk.argtypes = [number, pointer, pointer, count, count, count, pointer]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [number]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_validate_row_data.argtypes = [number, pointer, size]
    return library
