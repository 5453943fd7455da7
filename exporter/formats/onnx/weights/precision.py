"""Define the precisions of ONNX models: the name of each precision, and the storage format of each tensor.

In the precision int8, activations are floats, and ONNX Runtime quantises them block by block for each matrix product.
The mean KL divergence of SmolLM2 in int8 from SmolLM2 in float32 is 6e-3. Quantising each activation tensor with a
single scale (DynamicQuantizeLinear and MatMulInteger) is as fast as quantising in blocks, but increases the mean KL
divergence to 0.74.

int4 is a mixed precision, like llama.cpp's file types: the most sensitive matrices are stored in 8 bits, the other
matrices in 4 bits. If all matrices of SmolLM2 are stored in 4 bits, the mean KL divergence is 0.5. Neither asymmetric
codes nor scales fitted by least squares reduce the divergence of 0.5. The divergence is also 0.5 if every weight is
moved at random within its quantisation step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from exporter.errors import NotExpressible
from exporter.families.spec import Role, Slot
from exporter.formats.onnx.weights.blocks import BLOCK, Blocks

_EIGHT: Final = Blocks(8, symmetric=True)
#: Zero points cost 1/8 bit per value and reduce the KL of the mixed precision by a tenth.
_FOUR: Final = Blocks(4, symmetric=False)
_FOUR_SYMMETRIC: Final = Blocks(4, symmetric=True)
#: Suffix of the names of precisions with symmetric 4-bit codes.
_SYMMETRIC: Final = "-sym"

#: Roles with 4 bits in a mixed precision. If only a single role of SmolLM2 is stored in 4 bits, the mean KL is 0.24 for
#: down projections, 0.10 for values, 0.09 for the vocabulary, 0.04 for up, 0.03 for gate, 0.02 for output, and 0.015
#: for keys and queries.
_ROBUST: Final = frozenset({Role.Q, Role.ATTN_OUT, Role.GATE, Role.UP, Role.GATE_UP, Role.EXPERT_GATE, Role.EXPERT_UP})
#: Roles with 4 bits in a precision without zero points. With 4 bits for attention's matrices as well, the KL would be
#: 0.093 instead of 0.066, and the size 6 % smaller. In 8 bits, the matrices of queries, keys and values can be packed.
_MOST_ROBUST: Final = _ROBUST - {Role.Q, Role.ATTN_OUT}
_SENSITIVE: Final = frozenset({Role.K, Role.V, Role.QKV, Role.DOWN, Role.EXPERT_DOWN, Role.EMBED, Role.HEAD})
#: Share of the layers at either end with 8 bits for all roles. The 8-bit layers halve the KL and add 4 % to the size.
_ENDS: Final = 1 / 8


@dataclass(frozen=True, slots=True)
class Precision:
    """A precision of an ONNX model, with the storage formats of its tensors.

    name: the value of ``--quant``. stems: file name stems of the ONNX models; each model has an external data file.
    floats: dtype of activations, KV cache and unquantised tensors. bits: number of bits of the codes in quantised
    matrices; 4 means a mix of 4 and 8 bits. symmetric: whether 4-bit codes are stored without zero points, as 8-bit
    codes always are.
    """

    name: str
    stems: tuple[str, ...]
    floats: str
    bits: int | None = None
    symmetric: bool = False

    @property
    def js_dtype(self) -> str:
        """transformers.js' name for the precision, which is the suffix of the model's file names."""
        return self.name.removesuffix(_SYMMETRIC)

    def form(self, slot: Slot, shape: Sequence[int], layers: int) -> Blocks | None:
        """Return the block format in which a matrix is quantised, or None to keep floats.

        shape: (out, in) of the matrix. A matrix is quantised only if the length of its rows is a multiple of the block
        size. layers: number of layers of the model.
        """
        role, layer = slot.role, slot.layer
        if self.bits is None or role not in _ROBUST | _SENSITIVE or len(shape) != 2 or shape[1] % BLOCK:
            return None
        ends = int(layers * _ENDS)
        inside = layer is not None and ends <= layer < layers - ends
        robust, four = (_MOST_ROBUST, _FOUR_SYMMETRIC) if self.symmetric else (_ROBUST, _FOUR)
        return four if self.bits == 4 and role in robust and inside else _EIGHT


#: All precisions, in the order of writing. onnxruntime-genai opens the first model in a folder.
PRECISIONS: Final = {
    precision.name: precision
    for precision in (
        Precision("fp32", ("model",), "F32"),
        Precision("fp16", ("model_fp16",), "F16"),
        # The second stem is q8, the default in browsers.
        Precision("int8", ("model_int8", "model_quantized"), "F32", bits=8),
        # For transformers.js, a symmetric precision is a different model with an equal dtype: model_sym_q4 is found by
        # { model_file_name: "model_sym", dtype: "q4" }.
        Precision("q4", ("model_q4",), "F32", bits=4),
        Precision("q4-sym", ("model_sym_q4",), "F32", bits=4, symmetric=True),
        Precision("q4f16", ("model_q4f16",), "F16", bits=4),
        Precision("q4f16-sym", ("model_sym_q4f16",), "F16", bits=4, symmetric=True),
    )
}

_FLOATS: Final = {None: "fp32", "F32": "fp32", "F16": "fp16"}
_FOURS: Final = {None: "q4", "F32": "q4", "F16": "q4f16"}
#: User's spelling of 4-bit precisions → suffix of the precision's name.
_INT4: Final = {"int4": "", f"int4{_SYMMETRIC}": _SYMMETRIC}


def is_precision(name: str) -> bool:
    """Whether ``name``, in upper or lower case, is the name of a precision."""
    return name.lower() in PRECISIONS or name.lower() in _INT4


def choose(dtype: str | None, quants: Sequence[str]) -> list[Precision]:
    """Return the precisions that ``--dtype`` and ``--quant`` select, in the order of ``PRECISIONS``.

    dtype: a safetensors dtype name. quants: int8, int4, int4-sym, or names in ``PRECISIONS``. If ``quants`` is
    empty, the model is not quantised.
    Raises NotExpressible if the combination of dtype and quantisation is not supported.
    """
    if dtype not in _FLOATS:
        reason = f"--dtype {dtype}: ONNX Runtime has no {dtype} kernel for MatMul, Mul or Sigmoid on the CPU"
        raise NotExpressible("onnx", reason, instead="use --dtype f16, which gives a file as small as with bf16")
    names = {_FOURS[dtype] + _INT4[quant] if quant in _INT4 else quant for quant in quants} or {_FLOATS[dtype]}
    for name in sorted(names - PRECISIONS.keys()):
        known = ", ".join(["int8", *_INT4, *(precision for precision in PRECISIONS if precision != "int8")])
        raise NotExpressible("onnx", f"--quant {name} is not supported (supported: {known})")
    if dtype == "F16" and "int8" in names:
        raise NotExpressible(
            "onnx", "no ONNX client supports int8 weights combined with f16 activations", instead="omit --dtype"
        )
    return [precision for name, precision in PRECISIONS.items() if name in names]
