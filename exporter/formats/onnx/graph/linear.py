"""Build matrix products and embedding look-ups for float weights and for block-quantised weights.

A weight matrix is treated as quantised if the initialisers include scales for the matrix.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from exporter.formats.onnx.graph.builder import Builder
from exporter.formats.onnx.weights.blocks import BLOCK
from exporter.formats.onnx.weights.initialisers import SCALES, WEIGHT, ZERO_POINTS

ORT: Final = "com.microsoft"

#: MatMulNBits with this accuracy level rounds activations to 8 bits, block by block. With 8-bit weights, decoding is 20
#: times as fast as with float32 activations (SmolLM2, two cores), but the mean KL is 6.4e-3 instead of 2.3e-3.
_INT8_ACTIVATIONS: Final = 4


def linear(make: Builder, x: ir.Value, module: str, name: str) -> ir.Value:
    """Multiply ``x`` by the weight matrix of ``module``.

    A float weight matrix is transposed at export, and stored with the shape (in, out).

    MatMul with a transposed matrix is as fast as Gemm(transB=1) with the original matrix: SmolLM2 decodes 50.7 tokens/s
    with MatMul and 50.5 with Gemm (two cores, ONNX Runtime 1.32). Unlike Gemm, MatMul needs no Reshape nodes. The graph
    contains no Transpose node for the matrix, because ONNX Runtime would store a transposed copy at session start,
    which would increase SmolLM2's private memory from 539 MB to 721 MB.
    """
    if _is_quantised(make, module):
        return _product(make, x, module, name)
    return make.op("MatMul", [x, make.weight(f"{module}.{WEIGHT}")], name)


def select_linear(make: Builder, x: ir.Value, module: str, number: ir.Value, count: int, name: str) -> ir.Value:
    """Multiply ``x`` [n, H] by the matrix with index ``number`` among the ``count`` stacked matrices of ``module``.

    A Gather node copies the matrix out of the stack. For quantised matrices, a GatherBlockQuantized node copies and
    dequantises the matrix. For a single token, MatMulNBits on the copied codes would take 2.5 times as long as
    GatherBlockQuantized and Gemm, because ONNX Runtime can pack codes for MatMulNBits only if the codes are an
    initialiser.
    """
    weight = make.weight(f"{module}.{WEIGHT}")
    if not _is_quantised(make, module):
        return make.op("MatMul", [x, make.op("Gather", [weight, number], f"{name}.{WEIGHT}", axis=0)], name)
    parts = [make.weight(f"{module}.{suffix}") for suffix in _suffixes(make, module)]
    length = make.constant(_shape(weight)[0] // count, scalar=True)
    first = make.op("Mul", [number, length], f"{name}.first")
    end = make.op("Add", [first, length], f"{name}.end")
    rows = make.op("Range", [first, end, make.constant(1, scalar=True)], f"{name}.rows")
    bits = _shape(weight)[1] * 8 // (_shape(parts[1])[1] * BLOCK)
    look = {"bits": bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
    matrix = make.op("GatherBlockQuantized", [weight, rows, *parts[1:]], f"{name}.{WEIGHT}", domain=ORT, **look)
    return make.op("Gemm", [x, matrix], name, transB=1)


def look_up(make: Builder, module: str, ids: ir.Value) -> ir.Value:
    """Look up the embedding rows [B, S, H] of the token ids ``ids`` [B, S] in the matrix of ``module``."""
    weight = make.weight(f"{module}.{WEIGHT}")
    if not _is_quantised(make, module):
        return make.op("Gather", [weight, ids], module)
    # The codes keep the shape that MatMulNBits needs, (V, H / 32, bytes), so that a tied head can read the initialiser.
    # Only the scales are reshaped. ONNX Runtime folds the reshape at session start, into a copy with 1/9 of the codes'
    # bytes.
    scales = make.op("Unsqueeze", [make.weight(f"{module}.{SCALES}"), make.constant(2)], f"{module}.scales.column")
    bits = _bits(weight)
    look = {"bits": bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 2}
    blocks = make.op("GatherBlockQuantized", [weight, ids, scales], f"{module}.blocks", domain=ORT, **look)
    return make.op("Reshape", [blocks, make.constant(0, 0, -1)], module)


def head(make: Builder, x: ir.Value, module: str, name: str, *, fused: bool) -> ir.Value:
    """Multiply ``x`` [B, S, H] by the LM head (V, H), which has one row per token.

    A tied LM head shares the initialiser of the embedding.

    fused: whether to use ONNX Runtime's own operator for the product. The standard operator Gemm also accepts a (V, H)
    matrix, but needs a Reshape of the logits, which copies the logits (2.5 of the 345 ms that SmolLM2 takes for 128
    tokens on one core). ONNX Runtime packs the LM head into private memory, but Gather reads the embedding from the
    memory-mapped file. A session's private memory therefore contains a tied matrix only once (SmolLM2: 539 MB of
    private memory for 538 MB of weights). With the LM head as the first input of Gemm, ONNX Runtime would make no
    packed copy, which saves 108 MB of private memory, but makes decoding 10 to 14 % slower.
    """
    if _is_quantised(make, module):
        return _product(make, x, module, name)
    weight = make.weight(f"{module}.{WEIGHT}")
    if fused:
        return make.op("FusedMatMul", [x, weight], name, domain=ORT, transB=1)
    vocab, hidden = _shape(weight)
    rows = make.op("Reshape", [x, make.constant(-1, hidden)], f"{name}.rows")
    product = make.op("Gemm", [rows, weight], name, transB=1)
    lengths = make.op("Shape", [x], f"{name}.lengths", start=0, end=2)
    shape = make.op("Concat", [lengths, make.constant(vocab)], f"{name}.shape", axis=0)
    return make.op("Reshape", [product, shape], f"{name}.joined")


def _product(make: Builder, x: ir.Value, module: str, name: str) -> ir.Value:
    inputs = [x, *(make.weight(f"{module}.{suffix}") for suffix in _suffixes(make, module))]
    count, per_row, _ = _shape(inputs[1])
    form = {"K": per_row * BLOCK, "N": count, "bits": _bits(inputs[1]), "block_size": BLOCK}
    return make.op("MatMulNBits", inputs, name, domain=ORT, **form, accuracy_level=_INT8_ACTIVATIONS)


def _suffixes(make: Builder, module: str) -> list[str]:
    """Return the name suffixes of a quantised matrix's initialisers, in the input order of MatMulNBits."""
    return [WEIGHT, SCALES, *([ZERO_POINTS] if f"{module}.{ZERO_POINTS}" in make.weights else [])]


def _is_quantised(make: Builder, module: str) -> bool:
    return f"{module}.{SCALES}" in make.weights


def _bits(codes: ir.Value) -> int:
    return _shape(codes)[2] * 8 // BLOCK


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None, "expected an ONNX value with a known shape, found no shape"
    return value.shape.numpy()
