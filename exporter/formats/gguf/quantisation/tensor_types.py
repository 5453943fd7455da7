"""Which ggml type each tensor of a file gets, and whether its rows fill the blocks of that type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from exporter.families.spec import Role, Slot
from exporter.formats.gguf.quantisation.file_types import FileType
from exporter.formats.gguf.writer import encoded_nbytes
from exporter.formats.slots import NORMS
from exporter.sources.gguf.types import TENSOR_TYPES, TYPE_NUMBERS

#: llama.cpp computes with norms, biases, position embeddings and routers in float32 only.
_ALWAYS_F32: Final = NORMS | {Role.POSITIONS, Role.ROUTER}
#: For an estimate of the size: embedding and head get more bits than the rest in most file types.
_VOCABULARY_TYPE: Final = "Q6_K"
_VOCABULARY: Final = ("token_embd.weight", "output.weight")


def fits(tensor_type: str, width: int) -> bool:
    """Whether rows of ``width`` elements fill whole blocks of the type."""
    return width % TENSOR_TYPES[TYPE_NUMBERS[tensor_type]][1] == 0


def native_type(file_type: str, slot: Slot, shape: Sequence[int]) -> str:
    """The type of a tensor in a file of a native file type (F32, F16, BF16, Q8_0), as llama.cpp's converter chooses it.

    Rows that do not fill whole blocks are stored in F16.
    """
    if len(shape) < 2 or slot.parameter == "bias" or slot.role in _ALWAYS_F32:
        return "F32"
    return file_type if fits(file_type, shape[-1]) else "F16"


def estimated_nbytes(file_type: FileType, name: str, shape: Sequence[int]) -> int:
    """About the bytes of a tensor in a file that llama.cpp quantises. Its exact rules vary with the version."""
    if len(shape) < 2:
        return encoded_nbytes("F32", math.prod(shape))
    wanted = _VOCABULARY_TYPE if name in _VOCABULARY else file_type.type
    tensor_type = next((fitting for fitting in (wanted, "Q8_0") if fits(fitting, shape[-1])), "F16")
    return encoded_nbytes(tensor_type, math.prod(shape))
