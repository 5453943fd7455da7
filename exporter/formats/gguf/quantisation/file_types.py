"""A table of llama.cpp's quantised file types, with the name, enum number and main tensor type of each file type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class FileType:
    """A quantised file type from the list that llama-quantize prints.

    number: the value in the enum llama_ftype. type: the ggml type of most matrices; llama.cpp chooses other types for
    some tensors. needs_imatrix: whether llama.cpp refuses to quantise to the file type without an importance matrix.
    uses_imatrix: whether an importance matrix changes the quantised values.
    """

    name: str
    number: int
    type: str
    needs_imatrix: bool = False
    uses_imatrix: bool = True


def _by_name(*rows: FileType) -> dict[str, FileType]:
    table = {row.name: row for row in rows}
    assert len(table) == len(rows), "expected unique names of file types, found a duplicate name"
    return table


#: Source: enum llama_ftype in llama.h, llama_ftype_get_default_type and tensor_requires_imatrix in llama-quant.cpp.
FILE_TYPES: Final = _by_name(
    FileType("Q4_0", 2, "Q4_0"),
    FileType("Q4_1", 3, "Q4_1"),
    FileType("Q8_0", 7, "Q8_0", uses_imatrix=False),
    FileType("Q5_0", 8, "Q5_0"),
    FileType("Q5_1", 9, "Q5_1"),
    FileType("Q2_K", 10, "Q2_K"),
    FileType("Q3_K_S", 11, "Q3_K"),
    FileType("Q3_K_M", 12, "Q3_K"),
    FileType("Q3_K_L", 13, "Q3_K"),
    FileType("Q4_K_S", 14, "Q4_K"),
    FileType("Q4_K_M", 15, "Q4_K"),
    FileType("Q5_K_S", 16, "Q5_K"),
    FileType("Q5_K_M", 17, "Q5_K"),
    FileType("Q6_K", 18, "Q6_K"),
    FileType("IQ2_XXS", 19, "IQ2_XXS", needs_imatrix=True),
    FileType("IQ2_XS", 20, "IQ2_XS", needs_imatrix=True),
    FileType("Q2_K_S", 21, "Q2_K", needs_imatrix=True),
    FileType("IQ3_XS", 22, "IQ3_S"),
    FileType("IQ3_XXS", 23, "IQ3_XXS", needs_imatrix=True),
    FileType("IQ1_S", 24, "IQ1_S", needs_imatrix=True),
    FileType("IQ4_NL", 25, "IQ4_NL"),
    FileType("IQ3_S", 26, "IQ3_S"),
    FileType("IQ3_M", 27, "IQ3_S"),
    FileType("IQ2_S", 28, "IQ2_XS", needs_imatrix=True),
    FileType("IQ2_M", 29, "IQ2_S", needs_imatrix=True),
    FileType("IQ4_XS", 30, "IQ4_XS"),
    FileType("IQ1_M", 31, "IQ1_M", needs_imatrix=True),
    FileType("TQ1_0", 36, "TQ1_0"),
    FileType("TQ2_0", 37, "TQ2_0"),
    FileType("MXFP4_MOE", 38, "MXFP4"),
    FileType("Q1_0", 40, "Q1_0"),
    FileType("Q2_0", 41, "Q2_0"),
    # short names of llama-quantize
    FileType("Q3_K", 12, "Q3_K"),
    FileType("Q4_K", 15, "Q4_K"),
    FileType("Q5_K", 17, "Q5_K"),
)

#: File types written by ttexport itself, without llama.cpp → general.file_type. Source: enum llama_ftype in llama.h.
NATIVE_FILE_TYPES: Final = {"F32": 0, "F16": 1, "Q8_0": FILE_TYPES["Q8_0"].number, "BF16": 32}

#: ggml types that can be requested for a single tensor. Integer types and kernel-internal types (Q8_K, …) are excluded.
SELECTABLE_TENSOR_TYPES: Final = frozenset({"F32", "F16", "BF16", *(row.type for row in FILE_TYPES.values())})
#: ggml types that need an importance matrix for the quantised tensor: without importances ggml aborts the process.
#: Source: ggml_quantize_requires_imatrix.
NEED_IMPORTANCES: Final = frozenset({"IQ1_S", "IQ2_XXS", "IQ2_XS"})
