"""Constants of the GGUF format: the types of metadata values, and the tensor types with their block sizes.

The module also contains a function that decodes tensors of the type Q8_0.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from exporter.tensors import Array

MAGIC: Final = b"GGUF"
VERSION: Final = 3
DEFAULT_ALIGNMENT: Final = 32

#: Number of a fixed-size value type → numpy dtype. Source: enum gguf_type in ggml's gguf.h.
SCALARS: Final[dict[int, np.dtype[Any]]] = {
    number: np.dtype(name) for number, name in enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))
} | {10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8")}
BOOL: Final = 7
STRING: Final = 8
ARRAY: Final = 9

#: Type number → (name, elements per block, bytes per block). Source: enum ggml_type and the type table in ggml.c.
TENSOR_TYPES: Final[dict[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
TYPE_NUMBERS: Final = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}


def dequantize_q8_0(raw: Array) -> Array:
    """Decode rows of Q8_0 bytes, a uint8 array (n, blocks * 34), to a float32 array (n, blocks * 32).

    Source: block_q8_0 in ggml. A Q8_0 block is a float16 scale followed by 32 int8 values.
    """
    blocks = raw.reshape(len(raw), -1, 34)
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    return (blocks[..., 2:].view(np.int8) * scale).reshape(len(raw), -1)
