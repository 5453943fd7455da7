"""Build the linear layers, norms and activations of a decoder's ONNX graph.

Dimensions in comments: B is the batch size, S the number of tokens in the current call, T the number of tokens
including the KV cache, H the hidden size, V the vocabulary size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from exporter.families.spec import DecoderSpec, Role
from exporter.formats.onnx.graph.builder import Builder
from exporter.formats.onnx.graph.inputs import Inputs, decoder_inputs
from exporter.formats.onnx.graph.linear import linear


def path(role: Role, layer: int | None, part: str = "") -> str:
    """Return the module path of a role, such as ``layers.3.self_attn.q_proj``. part: a suffix, such as weight."""
    stem = role.value if layer is None else f"layers.{layer}.{role.value}"
    return f"{stem}.{part}" if part else stem


@dataclass(frozen=True)
class Modules:
    """Builds a decoder's linear layers, norms and activations. Each method call appends nodes to the graph."""

    spec: DecoderSpec
    make: Builder
    inputs: Inputs = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", decoder_inputs(self.spec, self.make.floats))

    def has(self, role: Role, layer: int | None) -> bool:
        """Whether the decoder has a weight tensor for ``role``."""
        return f"{path(role, layer)}.weight" in self.make.weights

    def norm(self, role: Role, layer: int | None, x: ir.Value) -> ir.Value:
        """Normalise ``x`` over the last axis with the norm that has the role ``role`` in ``layer``."""
        make, name, norm = self.make, path(role, layer), self.spec.norm
        scale = self.ones(self.spec.hidden) if norm.bare else make.weight(f"{name}.weight")
        if norm.type == "rms":
            return make.op("RMSNormalization", [x, scale], name, axis=-1, epsilon=norm.eps)
        factors: list[ir.Value] = [x, scale, *self._bias(name)]
        return make.op("LayerNormalization", factors, name, axis=-1, epsilon=norm.eps)

    def ones(self, length: int) -> ir.Value:
        """Return a vector of ones, in the dtype of the activations, for norms without a weight of their own."""
        return self.make.array(f"ones_{length}", np.ones(length, self.make.floats.numpy()))

    def linear(self, role: Role, layer: int, x: ir.Value) -> ir.Value:
        """Apply a linear layer to ``x``, and add the bias if the checkpoint contains a bias.

        role: which linear layer.
        """
        make, name = self.make, path(role, layer)
        bias = self._bias(name)
        product = linear(make, x, name, f"{name}.product" if bias else name)
        return make.op("Add", [product, *bias], name) if bias else product

    def split(self, x: ir.Value, sizes: Mapping[str, int]) -> Sequence[ir.Value]:
        """Split ``x`` along the last axis. sizes: maps output names to sizes."""
        return self.make.ops("Split", [x, self.make.constant(*sizes.values())], next(iter(sizes)), list(sizes), axis=-1)

    def scaled(self, x: ir.Value, factor: float, name: str) -> ir.Value:
        """Multiply ``x`` by ``factor``. If the factor is 1, no node is added, and ``x`` is returned."""
        return x if factor == 1 else self.make.op("Mul", [x, self.make.number(factor)], name)

    def capped(self, x: ir.Value, cap: float | None, name: str) -> ir.Value:
        """Apply soft-capping to ``x``: cap * tanh(x / cap).

        If ``cap`` is None, no node is added, and ``x`` is returned.
        """
        if cap is None:
            return x
        limit = self.make.number(cap)
        inner = self.make.op("Tanh", [self.make.op("Div", [x, limit], f"{name}.quotient")], f"{name}.tanh")
        return self.make.op("Mul", [inner, limit], name)

    def active(self, x: ir.Value, at: str) -> ir.Value:
        """Apply the MLP's activation function to ``x``."""
        make, activation = self.make, self.spec.mlp.activation
        if activation == "silu":
            return make.op("Mul", [x, make.op("Sigmoid", [x], f"{at}.act_fn.sigmoid")], f"{at}.act_fn")
        if activation == "relu2":
            positive = make.op("Relu", [x], f"{at}.act_fn.relu")
            return make.op("Mul", [positive, positive], f"{at}.act_fn")
        return make.op("Gelu", [x], f"{at}.act_fn", approximate="tanh" if activation == "gelu_tanh" else "none")

    def _bias(self, name: str) -> list[ir.Value]:
        bias = f"{name}.bias"
        return [self.make.weight(bias)] if bias in self.make.weights else []
