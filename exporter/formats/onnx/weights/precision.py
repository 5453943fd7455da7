"""The variants of a model in one folder: their names, and how they store each tensor.

int8 keeps activations in floats and lets the runtime round them block by block: a whole-tensor rounding of activations
(DynamicQuantizeLinear with MatMulInteger) has a mean KL of 0.74 on SmolLM2, this has 6e-3 at the same speed.

int4 is a mixed precision, as in llama.cpp's file types: the most sensitive matrices take 8 bits. With 4 bits everywhere
SmolLM2's mean KL is 0.5, symmetric or not, with nearest or least-squares scales, and also after moving all weights
at random within their 4-bit steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from exporter.errors import NotExpressible
from exporter.families.spec import Role, Slot
from exporter.formats.onnx.weights.blocks import BLOCK, Blocks

_EIGHT: Final = Blocks(8, symmetric=True)
#: Zero points cost 1/8 bit a value and take a tenth off the KL of the same mixed precision.
_FOUR: Final = Blocks(4, symmetric=False)
_FOUR_SYMMETRIC: Final = Blocks(4, symmetric=True)
#: Suffix of the names of precisions with symmetric 4-bit codes.
_SYMMETRIC: Final = "-sym"

#: Roles with 4 bits in a mixed precision. Alone in 4 bits, SmolLM2's down projections have a mean KL of 0.24, values
#: 0.10, the vocabulary 0.09, up 0.04, gate 0.03, output 0.02, keys and queries 0.015.
_ROBUST: Final = frozenset({Role.Q, Role.ATTN_OUT, Role.GATE, Role.UP, Role.GATE_UP, Role.EXPERT_GATE, Role.EXPERT_UP})
#: Roles with 4 bits without zero points. With attention's matrices in 4 bits, too, the KL would be 0.093 instead of
#: 0.066, for 6 % less size; and in 8 bits queries, keys and values can be one matrix.
_MOST_ROBUST: Final = _ROBUST - {Role.Q, Role.ATTN_OUT}
_SENSITIVE: Final = frozenset({Role.K, Role.V, Role.QKV, Role.DOWN, Role.EXPERT_DOWN, Role.EMBED, Role.HEAD})
#: This share of the layers at either end has 8 bits throughout: it halves the KL for 4 % of the size.
_ENDS: Final = 1 / 8


@dataclass(frozen=True, slots=True)
class Precision:
    """One variant. name: of ``--quant``. stems: the model files, each with its data file.

    floats: dtype of activations, cache and everything that is not quantised. bits: of matrices; 4: mixed with 8.
    symmetric: 4-bit codes have no zero points; 8-bit codes never have.
    """

    name: str
    stems: tuple[str, ...]
    floats: str
    bits: int | None = None
    symmetric: bool = False

    @property
    def js_dtype(self) -> str:
        """transformers.js' name of the dtype: the end of the files' names."""
        return self.name.removesuffix(_SYMMETRIC)

    def form(self, slot: Slot, shape: Sequence[int], layers: int) -> Blocks | None:
        """How the matrix (out, in) of ``slot`` is quantised; None for floats, or if its rows do not fill blocks.

        layers: number of layers of the model.
        """
        role, layer = slot.role, slot.layer
        if self.bits is None or role not in _ROBUST | _SENSITIVE or len(shape) != 2 or shape[1] % BLOCK:
            return None
        ends = int(layers * _ENDS)
        inside = layer is not None and ends <= layer < layers - ends
        robust, four = (_MOST_ROBUST, _FOUR_SYMMETRIC) if self.symmetric else (_ROBUST, _FOUR)
        return four if self.bits == 4 and role in robust and inside else _EIGHT


#: In the order of writing; onnxruntime-genai opens the first that a folder contains.
PRECISIONS: Final = {
    precision.name: precision
    for precision in (
        Precision("fp32", ("model",), "F32"),
        Precision("fp16", ("model_fp16",), "F16"),
        # The browser's default, q8, is the second name.
        Precision("int8", ("model_int8", "model_quantized"), "F32", bits=8),
        # To transformers.js, the symmetric variants are another model of the same dtype: it finds model_sym_q4 as
        # { model_file_name: "model_sym", dtype: "q4" }.
        Precision("q4", ("model_q4",), "F32", bits=4),
        Precision("q4-sym", ("model_sym_q4",), "F32", bits=4, symmetric=True),
        Precision("q4f16", ("model_q4f16",), "F16", bits=4),
        Precision("q4f16-sym", ("model_sym_q4f16",), "F16", bits=4, symmetric=True),
    )
}

_FLOATS: Final = {None: "fp32", "F32": "fp32", "F16": "fp16"}
_FOURS: Final = {None: "q4", "F32": "q4", "F16": "q4f16"}
#: int4 as users write it → suffix of the precision's name.
_INT4: Final = {"int4": "", f"int4{_SYMMETRIC}": _SYMMETRIC}


def is_precision(name: str) -> bool:
    """Whether ``choose`` accepts ``name``, in upper or lower case."""
    return name.lower() in PRECISIONS or name.lower() in _INT4


def choose(dtype: str | None, quants: Sequence[str]) -> list[Precision]:
    """The precisions of ``--dtype`` (safetensors spelling) and ``--quant``, in the order of the table.

    quants: int8, int4, int4-sym, or names of the table; empty: unquantised.
    Raises NotExpressible for a combination without a variant.
    """
    if dtype not in _FLOATS:
        reason = f"--dtype {dtype}: ONNX Runtime has no {dtype} kernel for MatMul, Mul or Sigmoid on the CPU"
        raise NotExpressible("onnx", reason, instead="--dtype f16 halves the file as well")
    names = {_FOURS[dtype] + _INT4[quant] if quant in _INT4 else quant for quant in quants} or {_FLOATS[dtype]}
    for name in sorted(names - PRECISIONS.keys()):
        known = ", ".join(["int8", *_INT4, *(precision for precision in PRECISIONS if precision != "int8")])
        raise NotExpressible("onnx", f"--quant {name}: this version writes {known}")
    if dtype == "F16" and "int8" in names:
        raise NotExpressible("onnx", "no client opens int8 with f16", instead="leave --dtype out")
    return [precision for name, precision in PRECISIONS.items() if name in names]
