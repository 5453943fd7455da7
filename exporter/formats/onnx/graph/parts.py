"""What every part of a decoder's graph is built with: module paths, the graph's inputs, linears and norms.

Shapes in comments: B batch, S tokens of this call, T tokens with the cache, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx_ir as ir

from exporter.families.spec import DecoderSpec, Role
from exporter.formats.onnx.graph.builder import Builder
from exporter.formats.onnx.graph.linear import linear

#: Clients resolve dimensions by these very names: transformers.js sizes the first, empty cache from them.
BATCH: Final = "batch_size"
SEQUENCE: Final = "sequence_length"
PAST: Final = "past_sequence_length"
TOTAL: Final = "total_sequence_length"

Pair = tuple[ir.Value, ir.Value]


def path(role: Role, layer: int | None, part: str = "") -> str:
    """The module path of a role (``layers.3.self_attn.q_proj``); with ``part`` the name of its tensor."""
    stem = role.value if layer is None else f"layers.{layer}.{role.value}"
    return f"{stem}.{part}" if part else stem


@dataclass(frozen=True)
class Inputs:
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


def inputs(spec: DecoderSpec, floats: ir.DataType) -> Inputs:
    """The inputs of a decoder of ``spec``, whose cache is in ``floats``."""

    def ids(name: str, length: str) -> ir.Value:
        return typed(ir.Value(name=name), ir.DataType.INT64, BATCH, length)

    def past(layer: int, part: str) -> ir.Value:
        return typed(ir.Value(name=f"past_key_values.{layer}.{part}"), floats, *cache_shape(spec, PAST))

    pairs = [(past(layer, "key"), past(layer, "value")) for layer in range(spec.layers)]
    return Inputs(ids("input_ids", SEQUENCE), ids("attention_mask", TOTAL), ids("position_ids", SEQUENCE), pairs)


def cache_shape(spec: DecoderSpec, length: str) -> list[int | str]:
    """[B, key heads, length, head width]."""
    return [BATCH, spec.attention.kv_heads, length, spec.attention.head_dim]


def typed(value: ir.Value, dtype: ir.DataType, *shape: int | str | None) -> ir.Value:
    """``value`` itself, declared as a tensor of ``shape``."""
    value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)
    return value


@dataclass(frozen=True)
class Parts:
    """A graph under construction."""

    spec: DecoderSpec
    make: Builder
    given: Inputs = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "given", inputs(self.spec, self.make.floats))

    def has(self, role: Role, layer: int | None) -> bool:
        """Whether the decoder has tensors of this role."""
        return f"{path(role, layer)}.weight" in self.make.weights

    def norm(self, role: Role, layer: int | None, x: ir.Value) -> ir.Value:
        """X normalised over its last axis."""
        make, name, norm = self.make, path(role, layer), self.spec.norm
        scale = make.weight(f"{name}.weight")
        if norm.kind == "rms":
            return make.op("RMSNormalization", [x, scale], name, axis=-1, epsilon=norm.eps)
        factors: list[ir.Value] = [x, scale, *self._bias(name)]
        return make.op("LayerNormalization", factors, name, axis=-1, epsilon=norm.eps)

    def linear(self, role: Role, layer: int, x: ir.Value) -> ir.Value:
        """X times the matrix of a role, plus a bias where the checkpoint has one."""
        make, name = self.make, path(role, layer)
        bias = self._bias(name)
        product = linear(make, x, name, f"{name}.product" if bias else name)
        return make.op("Add", [product, *bias], name) if bias else product

    def split(self, x: ir.Value, sizes: Mapping[str, int]) -> Sequence[ir.Value]:
        """X cut along its last axis into pieces of the named sizes."""
        return self.make.ops("Split", [x, self.make.constant(*sizes.values())], next(iter(sizes)), list(sizes), axis=-1)

    def scaled(self, x: ir.Value, factor: float, name: str) -> ir.Value:
        """X times ``factor``, without a node where that is 1."""
        return x if factor == 1 else self.make.op("Mul", [x, self.make.number(factor)], name)

    def capped(self, x: ir.Value, cap: float | None, name: str) -> ir.Value:
        """Cap * tanh(x / cap)."""
        if cap is None:
            return x
        limit = self.make.number(cap)
        inner = self.make.op("Tanh", [self.make.op("Div", [x, limit], f"{name}.quotient")], f"{name}.tanh")
        return self.make.op("Mul", [inner, limit], name)

    def active(self, x: ir.Value, at: str) -> ir.Value:
        """The activation of the MLP."""
        make, kind = self.make, self.spec.mlp.activation
        if kind == "silu":
            return make.op("Mul", [x, make.op("Sigmoid", [x], f"{at}.act_fn.sigmoid")], f"{at}.act_fn")
        return make.op("Gelu", [x], f"{at}.act_fn", approximate="tanh" if kind == "gelu_tanh" else "none")

    def _bias(self, name: str) -> list[ir.Value]:
        bias = f"{name}.bias"
        return [self.make.weight(bias)] if bias in self.make.weights else []
