"""The graph of a decoder, from its description: standard operators of opset 23 only.

Shapes in comments: B batch, S tokens of this call, T tokens with the cache, H hidden, V vocabulary.
Sources: the ONNX operator pages of Attention-23, RotaryEmbedding-23 and RMSNormalization-23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from exporter.families.spec import DecoderSpec, Role
from exporter.formats.onnx.builder import Builder

OPSET: Final = 23
IR_VERSION: Final = 11

COS_CACHE: Final = "rotary_emb.cos_cache"
SIN_CACHE: Final = "rotary_emb.sin_cache"

#: Clients resolve dimensions by these very names: transformers.js sizes the first, empty cache from them.
BATCH: Final = "batch_size"
SEQUENCE: Final = "sequence_length"
PAST: Final = "past_sequence_length"
TOTAL: Final = "total_sequence_length"

Pair = tuple[ir.Value, ir.Value]


@dataclass(frozen=True)
class _Inputs:
    """The graph's inputs; ``past`` has a (key, value) pair a layer."""

    input_ids: ir.Value
    attention_mask: ir.Value
    position_ids: ir.Value
    past: Sequence[Pair]

    @property
    def values(self) -> list[ir.Value]:
        """In the order in which they are declared."""
        cache = [value for pair in self.past for value in pair]
        return [self.input_ids, self.attention_mask, self.position_ids, *cache]


def path(role: Role, layer: int | None, part: str = "") -> str:
    """The module path of a role (``layers.3.self_attn.q_proj``); with ``part`` the name of its tensor."""
    stem = role.value if layer is None else f"layers.{layer}.{role.value}"
    return f"{stem}.{part}" if part else stem


def build(spec: DecoderSpec, weights: Mapping[str, ir.Value], *, tied: bool) -> ir.Graph:
    """The graph. ``weights``: every initialiser by ``path``, and the two rotary caches."""
    return _Decoder(spec, weights, tied=tied).graph()


class _Decoder:
    def __init__(self, spec: DecoderSpec, weights: Mapping[str, ir.Value], *, tied: bool) -> None:
        self.spec = spec
        self.head = path(Role.EMBED if tied else Role.HEAD, None)
        self.make = Builder(weights)
        self.given = _inputs(spec)

    def graph(self) -> ir.Graph:
        spec, make, given = self.spec, self.make, self.given
        mask = self._mask()
        embed = path(Role.EMBED, None)
        x = make.op("Gather", [make.weight(f"{embed}.weight"), given.input_ids], embed)  # [B, S, H]
        presents: list[ir.Value] = []
        for layer in range(spec.layers):
            x, present = self._layer(layer, x, mask)
            presents += present
        logits = self._logits(self._norm(Role.FINAL_NORM, None, x))
        outputs = [_typed(logits, BATCH, SEQUENCE, spec.vocab)]
        outputs += [_typed(value, *_cache_shape(spec, TOTAL)) for value in presents]
        return ir.Graph(
            given.values,
            outputs,
            nodes=make.nodes,
            initializers=make.initialisers,
            opset_imports={"": OPSET},
            name="decoder",
        )

    def _mask(self) -> ir.Value:
        """Bool [B, 1, S, T]: the keys that a query may see. Padding is hidden on either side of the text."""
        make, given, at = self.make, self.given, "mask"
        zero, one = make.constant(0, scalar=True), make.constant(1, scalar=True)
        total = make.op("Shape", [given.attention_mask], f"{at}.total_length", start=1, end=2)
        total = make.op("Squeeze", [total], f"{at}.total_length.scalar")
        length = make.op("Shape", [given.input_ids], f"{at}.length", start=1, end=2)
        length = make.op("Squeeze", [length], f"{at}.length.scalar")
        past = make.op("Sub", [total, length], f"{at}.past_length")
        keys = make.op("Range", [zero, total, one], f"{at}.keys")
        queries = make.op("Range", [past, total, one], f"{at}.queries")
        queries = make.op("Unsqueeze", [queries, make.constant(1)], f"{at}.queries.column")
        causal = make.op("LessOrEqual", [keys, queries], f"{at}.causal")  # [S, T]
        text = make.op("Cast", [given.attention_mask], f"{at}.text", to=int(ir.DataType.BOOL))
        text = make.op("Unsqueeze", [text, make.constant(1, 2)], f"{at}.text.row")  # [B, 1, 1, T]
        seen = make.op("And", [causal, text], f"{at}.seen")
        # Padding in front of the text would see nothing at all, and the softmax of nothing is NaN: it may see itself.
        itself = make.op("Equal", [keys, queries], f"{at}.itself")
        return make.op("Or", [seen, itself], at)

    def _layer(self, layer: int, x: ir.Value, mask: ir.Value) -> tuple[ir.Value, Sequence[ir.Value]]:
        make, at = self.make, f"layers.{layer}"
        mixed, present = self._attention(layer, self._norm(Role.ATTN_NORM, layer, x), mask)
        x = make.op("Add", [x, mixed], f"{at}.self_attn.residual")
        inner = self._mlp(layer, self._norm(Role.MLP_NORM, layer, x))
        return make.op("Add", [x, inner], f"{at}.mlp.residual"), present

    def _attention(self, layer: int, x: ir.Value, mask: ir.Value) -> tuple[ir.Value, Sequence[ir.Value]]:
        attention, at = self.spec.attention, f"layers.{layer}.self_attn"
        q = self._rotate(self._linear(Role.Q, layer, x), attention.heads, f"{at}.q_rotated")
        k = self._rotate(self._linear(Role.K, layer, x), attention.kv_heads, f"{at}.k_rotated")
        v = self._linear(Role.V, layer, x)
        mixed, *present = self.make.ops(
            "Attention",
            [q, k, v, mask, *self.given.past[layer]],
            at,
            (at, f"present.{layer}.key", f"present.{layer}.value"),
            q_num_heads=attention.heads,
            kv_num_heads=attention.kv_heads,
            scale=attention.scale,
        )
        return self._linear(Role.ATTN_OUT, layer, mixed), present

    def _rotate(self, x: ir.Value, heads: int, name: str) -> ir.Value:
        caches = [self.make.weight(COS_CACHE), self.make.weight(SIN_CACHE)]
        return self.make.op("RotaryEmbedding", [x, *caches, self.given.position_ids], name, num_heads=heads)

    def _mlp(self, layer: int, x: ir.Value) -> ir.Value:
        make, at = self.make, f"layers.{layer}.mlp"
        gate, up = self._linear(Role.GATE, layer, x), self._linear(Role.UP, layer, x)
        sigmoid = make.op("Sigmoid", [gate], f"{at}.act_fn.sigmoid")
        active = make.op("Mul", [gate, sigmoid], f"{at}.act_fn")
        return self._linear(Role.DOWN, layer, make.op("Mul", [active, up], f"{at}.gated"))

    def _norm(self, role: Role, layer: int | None, x: ir.Value) -> ir.Value:
        name = path(role, layer)
        weight = self.make.weight(f"{name}.weight")
        return self.make.op("RMSNormalization", [x, weight], name, axis=-1, epsilon=self.spec.norm.eps)

    def _linear(self, role: Role, layer: int, x: ir.Value) -> ir.Value:
        """X times a matrix that is stored (in, out), plus a bias where the checkpoint has one.

        MatMul on transposed data is as fast as Gemm(transB=1) on the stored matrix (SmolLM2 on two cores, ONNX Runtime
        1.32: decode 50.7 and 50.5 tokens/s), and needs no reshapes around it. A Transpose in the graph is no way out:
        it is folded when a session starts, which leaves it with 721 MB of private memory instead of 539.
        """
        make, name = self.make, path(role, layer)
        weight = make.weight(f"{name}.weight")
        if f"{name}.bias" not in make.weights:
            return make.op("MatMul", [x, weight], name)
        product = make.op("MatMul", [x, weight], f"{name}.product")
        return make.op("Add", [product, make.weight(f"{name}.bias")], name)

    def _logits(self, x: ir.Value) -> ir.Value:
        """X times the head (V, H), which keeps its rows: a tied one is the very initialiser that Gather reads.

        Gemm takes it as it is; it only knows two dimensions. ONNX Runtime packs the matrix once into private memory;
        what Gather reads stays a mapping of the file. So a session's private memory holds each weight once (SmolLM2:
        539 MB for 538 MB of weights). Gemm(head, x), with the matrix first, is not packed and saves 108 MB of that,
        but decodes 10 to 14 % slower.
        """
        make, at = self.make, path(Role.HEAD, None)
        rows = make.op("Reshape", [x, make.constant(-1, self.spec.hidden)], f"{at}.rows")
        product = make.op("Gemm", [rows, make.weight(f"{self.head}.weight")], at, transB=1)
        lengths = make.op("Shape", [self.given.input_ids], f"{at}.lengths")
        shape = make.op("Concat", [lengths, make.constant(self.spec.vocab)], f"{at}.shape", axis=0)
        return make.op("Reshape", [product, shape], "logits")


def _inputs(spec: DecoderSpec) -> _Inputs:
    def ids(name: str, length: str) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape([BATCH, length]), type=ir.TensorType(ir.DataType.INT64))

    def past(layer: int, part: str) -> ir.Value:
        return _typed(ir.Value(name=f"past_key_values.{layer}.{part}"), *_cache_shape(spec, PAST))

    pairs = [(past(layer, "key"), past(layer, "value")) for layer in range(spec.layers)]
    return _Inputs(ids("input_ids", SEQUENCE), ids("attention_mask", TOTAL), ids("position_ids", SEQUENCE), pairs)


def _cache_shape(spec: DecoderSpec, length: str) -> list[int | str]:
    return [BATCH, spec.attention.kv_heads, length, spec.attention.head_dim]


def _typed(value: ir.Value, *shape: int | str) -> ir.Value:
    value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    return value
