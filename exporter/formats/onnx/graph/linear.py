"""Products with a stored matrix and look-ups of its rows, for matrices of floats and for quantised ones.

The initialisers decide, as with biases: a matrix with scales is quantised.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from exporter.formats.onnx.graph.builder import Builder
from exporter.formats.onnx.weights.blocks import BLOCK
from exporter.formats.onnx.weights.initialisers import SCALES, WEIGHT, ZERO_POINTS

ORT: Final = "com.microsoft"

#: The kernel rounds activations to 8 bits, block by block: decoding is 20 times as fast as with float32 activations on
#: 8-bit weights (SmolLM2, two cores), for a mean KL of 6.4e-3 instead of 2.3e-3.
_INT8_ACTIVATIONS: Final = 4


def linear(make: Builder, x: ir.Value, module: str, name: str) -> ir.Value:
    """X times the matrix of ``module``. A matrix without scales is stored as (in, out).

    MatMul on transposed data is as fast as Gemm(transB=1) on the stored matrix (SmolLM2 on two cores, ONNX Runtime
    1.32: decode 50.7 and 50.5 tokens/s), and needs no reshapes around it. A Transpose in the graph is not an
    alternative: it is folded when a session starts, which then has 721 MB of private memory instead of 539.
    """
    if _is_quantised(make, module):
        return _product(make, x, module, name)
    return make.op("MatMul", [x, make.weight(f"{module}.{WEIGHT}")], name)


def select_linear(make: Builder, x: ir.Value, module: str, number: ir.Value, count: int, name: str) -> ir.Value:
    """X [n, H] times matrix ``number`` of the ``count`` stacked matrices of ``module``, copied out of the stack first.

    A quantised matrix is dequantised by the copy. MatMulNBits would do the same, as it could not pack the codes when
    the session started, and take 2.5 times as long for one token.
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
    """The rows ``ids`` [B, S] of the matrix of ``module``, which has one row per token: [B, S, H]."""
    weight = make.weight(f"{module}.{WEIGHT}")
    if not _is_quantised(make, module):
        return make.op("Gather", [weight, ids], module)
    # The codes keep the shape that MatMulNBits needs, (V, H / 32, bytes), so that a tied head reads the same
    # initialiser. Only the scales get another axis, which is folded when a session starts: 1/9 of the codes' bytes.
    scales = make.op("Unsqueeze", [make.weight(f"{module}.{SCALES}"), make.constant(2)], f"{module}.scales.column")
    bits = _bits(weight)
    look = {"bits": bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 2}
    blocks = make.op("GatherBlockQuantized", [weight, ids, scales], f"{module}.blocks", domain=ORT, **look)
    return make.op("Reshape", [blocks, make.constant(0, 0, -1)], module)


def head(make: Builder, x: ir.Value, module: str, name: str, *, fused: bool) -> ir.Value:
    """X [B, S, H] times the head (V, H), which has one row per token; a tied head is the initialiser of ``look_up``.

    ``fused``: by ONNX Runtime's operator. The standard operator for such a matrix, Gemm, supports only two dimensions,
    and the reshape after it copies the logits: 2.5 of the 345 ms that SmolLM2 takes for 128 tokens on one core. ONNX
    Runtime packs the matrix once into private memory, while Gather reads a mapping of the file. So a session's private
    memory holds each weight once (SmolLM2: 539 MB for 538 MB of weights). Gemm(head, x), with the matrix first, is not
    packed and saves 108 MB of that, but decodes 10 to 14 % slower.
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
    """The suffixes of a quantised matrix's initialisers, in the order of the operators' inputs."""
    return [WEIGHT, SCALES, *([ZERO_POINTS] if f"{module}.{ZERO_POINTS}" in make.weights else [])]


def _is_quantised(make: Builder, module: str) -> bool:
    return f"{module}.{SCALES}" in make.weights


def _bits(codes: ir.Value) -> int:
    return _shape(codes)[2] * 8 // BLOCK


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None, "initialisers have a shape"
    return value.shape.numpy()
