"""A thin layer over onnx_ir that builds nodes and values under readable names.

A node and its first output have the same name, the module path (``layers.3.self_attn.q_proj``); helper nodes append a
word (``layers.3.mlp.act_fn.sigmoid``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Attribute = int | float | str | Sequence[int] | ir.Graph


class Builder:
    """Collects the nodes and initialisers of one graph, in the order they are made."""

    def __init__(
        self,
        weights: Mapping[str, ir.Value],
        floats: ir.DataType = ir.DataType.FLOAT,
        constants: dict[str, ir.Value] | None = None,
    ) -> None:
        """``weights``: initialiser name → value. floats: type of the activations. constants: of an enclosing graph."""
        self.nodes: list[ir.Node] = []
        self.floats = floats
        self.weights = weights
        self._constants = {} if constants is None else constants

    def inner(self) -> Builder:
        """A builder for a nested graph, which shares this graph's weights and constants."""
        return Builder(self.weights, self.floats, self._constants)

    @property
    def initialisers(self) -> list[ir.Value]:
        """Weights, then the constants of the nodes."""
        return [*self.weights.values(), *self._constants.values()]

    def weight(self, name: str) -> ir.Value:
        """The initialiser ``name``. Raises KeyError if the layout does not contain it."""
        return self.weights[name]

    def constant(self, *numbers: int, scalar: bool = False) -> ir.Value:
        """An int64 vector (or scalar) stored in the model file; equal constants are shared."""
        name = ("scalar_" if scalar else "vector_") + "_".join(map(str, numbers)).replace("-", "minus")
        return self.array(name, np.array(numbers[0] if scalar else numbers, np.int64))

    def number(self, value: float) -> ir.Value:
        """A scalar in the type of the activations, stored in the model file; equal constants are shared."""
        return self.array(f"number_{value!r}", np.array(value, self.floats.numpy()))

    @property
    def truth(self) -> ir.Value:
        """The boolean scalar true."""
        return self.array("true", np.array(True))

    def array(self, name: str, value: npt.NDArray[Any]) -> ir.Value:
        """``value``, stored in the model file under ``name``."""
        if name not in self._constants:
            self._constants[name] = initialiser(ir.Tensor(value, name=name))
        return self._constants[name]

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, *, domain: str = "", **attributes: Attribute
    ) -> ir.Value:
        """Append a node with one output and return it."""
        return self.ops(op_type, inputs, name, (name,), domain=domain, **attributes)[0]

    def cast(self, x: ir.Value, source: ir.DataType, target: ir.DataType, name: str) -> ir.Value:
        """X cast from ``source`` to ``target``; x itself if the types are equal."""
        return x if source is target else self.op("Cast", [x], name, to=int(target))

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        outputs: Sequence[str],
        *,
        domain: str = "",
        **attributes: Attribute,
    ) -> Sequence[ir.Value]:
        """Append a node with the named outputs and return them."""
        values = [ir.Value(name=output) for output in outputs]
        self.nodes.append(ir.node(op_type, inputs, attributes, domain=domain, outputs=values, name=name))
        return values


def initialiser(tensor: ir.Tensor[Any] | ir.ExternalTensor) -> ir.Value:
    """The graph value of ``tensor``."""
    tensor_type = ir.TensorType(tensor.dtype)
    return ir.Value(name=tensor.name, shape=ir.Shape(list(tensor.shape)), type=tensor_type, const_value=tensor)
