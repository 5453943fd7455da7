"""A thin layer over onnx_ir that builds nodes and values with readable names.

A node and its first output share a name, the module path (``layers.3.self_attn.q_proj``); helper nodes append a
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
    """Collects the nodes and initialisers of a graph, in the order of creation."""

    def __init__(
        self,
        weights: Mapping[str, ir.Value],
        floats: ir.DataType = ir.DataType.FLOAT,
        constants: dict[str, ir.Value] | None = None,
    ) -> None:
        """weights: initialiser name → value. floats: activations' type. constants: constants of the enclosing graph."""
        self.nodes: list[ir.Node] = []
        self.floats = floats
        self.weights = weights
        self._constants = {} if constants is None else constants

    def inner(self) -> Builder:
        """Create a builder for a nested graph that shares the enclosing graph's weights and constants."""
        return Builder(self.weights, self.floats, self._constants)

    @property
    def initialisers(self) -> list[ir.Value]:
        """All initialisers: first the weights, then the constants of the nodes."""
        return [*self.weights.values(), *self._constants.values()]

    def weight(self, name: str) -> ir.Value:
        """The initialiser ``name``. Raises KeyError if the layout does not contain the initialiser."""
        return self.weights[name]

    def constant(self, *numbers: int, scalar: bool = False) -> ir.Value:
        """An int64 vector (or scalar) stored in the model file. Equal constants are stored once."""
        name = ("scalar_" if scalar else "vector_") + "_".join(map(str, numbers)).replace("-", "minus")
        return self.array(name, np.array(numbers[0] if scalar else numbers, np.int64))

    def number(self, value: float) -> ir.Value:
        """A scalar in the activations' type, stored in the model file. Equal constants are stored once."""
        return self.array(f"number_{value!r}", np.array(value, self.floats.numpy()))

    @property
    def truth(self) -> ir.Value:
        """The boolean scalar true."""
        return self.array("true", np.array(True))

    def array(self, name: str, value: npt.NDArray[Any]) -> ir.Value:
        """Store the array ``value`` in the model file under ``name``."""
        if name not in self._constants:
            self._constants[name] = initialiser(ir.Tensor(value, name=name))
        return self._constants[name]

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, *, domain: str = "", **attributes: Attribute
    ) -> ir.Value:
        """Append a node with a single output. Returns the output."""
        return self.ops(op_type, inputs, name, (name,), domain=domain, **attributes)[0]

    def cast(self, x: ir.Value, source: ir.DataType, target: ir.DataType, name: str) -> ir.Value:
        """Cast ``x`` from ``source`` to ``target``. Returns ``x`` itself if the types are equal."""
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
        """Append a node with the named outputs. Returns the outputs."""
        values = [ir.Value(name=output) for output in outputs]
        self.nodes.append(ir.node(op_type, inputs, attributes, domain=domain, outputs=values, name=name))
        return values


def initialiser(tensor: ir.Tensor[Any] | ir.ExternalTensor) -> ir.Value:
    """Create the graph value for the initialiser ``tensor``."""
    tensor_type = ir.TensorType(tensor.dtype)
    return ir.Value(name=tensor.name, shape=ir.Shape(list(tensor.shape)), type=tensor_type, const_value=tensor)
