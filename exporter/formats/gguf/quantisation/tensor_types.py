"""Choose the ggml type of each tensor of a GGUF, and check that the tensor's rows fill whole blocks of the type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from exporter.families.spec import Role, Slot
from exporter.formats.gguf.quantisation.file_types import FileType
from exporter.formats.gguf.writer import encoded_nbytes
from exporter.formats.slots import NORMS
from exporter.sources.gguf.types import TENSOR_TYPES, TYPE_NUMBERS

#: llama.cpp supports norms, biases, position embeddings and routers in float32 only.
_ALWAYS_F32: Final = NORMS | {Role.POSITIONS, Role.ROUTER}
#: Types for estimating the size: most file types store embedding and head with more bits than other tensors.
_VOCABULARY_TYPE: Final = "Q6_K"
_VOCABULARY: Final = ("token_embd.weight", "output.weight")


def fits(tensor_type: str, width: int) -> bool:
    """Whether rows of ``width`` elements fill whole blocks of ``tensor_type``."""
    return width % TENSOR_TYPES[TYPE_NUMBERS[tensor_type]][1] == 0


def native_type(file_type: str, slot: Slot, shape: Sequence[int]) -> str:
    """Return the type in which llama.cpp's converter stores a tensor, for the file type F32, F16, BF16 or Q8_0.

    A matrix whose rows do not fill whole blocks of the file type is stored in F16.
    """
    if len(shape) < 2 or slot.parameter == "bias" or slot.role in _ALWAYS_F32:
        return "F32"
    return file_type if fits(file_type, shape[-1]) else "F16"


def estimated_nbytes(file_type: FileType, name: str, shape: Sequence[int]) -> int:
    """Estimated size, in bytes, of a tensor in a quantised GGUF.

    The size is only an estimate, because different versions of llama.cpp choose different types for the tensor.
    """
    if len(shape) < 2:
        return encoded_nbytes("F32", math.prod(shape))
    wanted = _VOCABULARY_TYPE if name in _VOCABULARY else file_type.type
    tensor_type = next((fitting for fitting in (wanted, "Q8_0") if fits(fitting, shape[-1])), "F16")
    return encoded_nbytes(tensor_type, math.prod(shape))
