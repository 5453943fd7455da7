"""The quantisations of a whole file that llama.cpp makes: which number, and of which type most tensors are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Mixture:
    """A row of llama-quantize's table. number: llama_ftype. type: of most matrices; llama.cpp varies it by tensor."""

    name: str
    number: int
    type: str
    needs_imatrix: bool = False


def _by_name(*rows: Mixture) -> dict[str, Mixture]:
    table = {row.name: row for row in rows}
    assert len(table) == len(rows), "a mixture stands twice"
    return table


#: Source: enum llama_ftype in llama.h, llama_ftype_get_default_type and tensor_requires_imatrix in llama-quant.cpp.
MIXTURES: Final = _by_name(
    Mixture("Q4_0", 2, "Q4_0"),
    Mixture("Q4_1", 3, "Q4_1"),
    Mixture("Q8_0", 7, "Q8_0"),
    Mixture("Q5_0", 8, "Q5_0"),
    Mixture("Q5_1", 9, "Q5_1"),
    Mixture("Q2_K", 10, "Q2_K"),
    Mixture("Q3_K_S", 11, "Q3_K"),
    Mixture("Q3_K_M", 12, "Q3_K"),
    Mixture("Q3_K_L", 13, "Q3_K"),
    Mixture("Q4_K_S", 14, "Q4_K"),
    Mixture("Q4_K_M", 15, "Q4_K"),
    Mixture("Q5_K_S", 16, "Q5_K"),
    Mixture("Q5_K_M", 17, "Q5_K"),
    Mixture("Q6_K", 18, "Q6_K"),
    Mixture("IQ2_XXS", 19, "IQ2_XXS", needs_imatrix=True),
    Mixture("IQ2_XS", 20, "IQ2_XS", needs_imatrix=True),
    Mixture("Q2_K_S", 21, "Q2_K", needs_imatrix=True),
    Mixture("IQ3_XS", 22, "IQ3_S"),
    Mixture("IQ3_XXS", 23, "IQ3_XXS", needs_imatrix=True),
    Mixture("IQ1_S", 24, "IQ1_S", needs_imatrix=True),
    Mixture("IQ4_NL", 25, "IQ4_NL"),
    Mixture("IQ3_S", 26, "IQ3_S"),
    Mixture("IQ3_M", 27, "IQ3_S"),
    Mixture("IQ2_S", 28, "IQ2_XS", needs_imatrix=True),
    Mixture("IQ2_M", 29, "IQ2_S", needs_imatrix=True),
    Mixture("IQ4_XS", 30, "IQ4_XS"),
    Mixture("IQ1_M", 31, "IQ1_M", needs_imatrix=True),
    Mixture("TQ1_0", 36, "TQ1_0"),
    Mixture("TQ2_0", 37, "TQ2_0"),
    Mixture("MXFP4_MOE", 38, "MXFP4"),
    Mixture("Q1_0", 40, "Q1_0"),
    Mixture("Q2_0", 41, "Q2_0"),
    # llama-quantize's short names
    Mixture("Q3_K", 12, "Q3_K"),
    Mixture("Q4_K", 15, "Q4_K"),
    Mixture("Q5_K", 17, "Q5_K"),
)

#: Types that the quantiser can be asked for by tensor. Those that only computing uses (Q8_K, …) and integers cannot be.
TENSOR_TYPES: Final = frozenset({"F32", "F16", "BF16", *(row.type for row in MIXTURES.values())})
#: ggml ends the process rather than quantise to these without importances. Source: ggml_quantize_requires_imatrix.
NEED_IMPORTANCES: Final = frozenset({"IQ1_S", "IQ2_XXS", "IQ2_XS"})
