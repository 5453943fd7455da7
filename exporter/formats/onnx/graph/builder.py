"""A thin wrapper around onnx_ir that creates graph nodes and values with readable names.

A node and the node's first output are both named by the module path (``layers.3.self_attn.q_proj``). If a module needs
several nodes, the name of each further node is the module path plus a word (``layers.3.mlp.act_fn.sigmoid``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Attribute = int | float | str | Sequence[int] | ir.Graph


class Builder:
    """Collects the nodes and initialisers of an ONNX graph in the order of creation."""

    def __init__(
        self,
        weights: Mapping[str, ir.Value],
        floats: ir.DataType = ir.DataType.FLOAT,
        constants: dict[str, ir.Value] | None = None,
    ) -> None:
        """Create a builder for an ONNX graph.

        weights: maps initialiser names to graph values. floats: dtype of activations. constants: the constants of the
        enclosing graph, if the builder is for a nested graph.
        """
        self.nodes: list[ir.Node] = []
        self.floats = floats
        self.weights = weights
        self._constants = {} if constants is None else constants

    def inner(self) -> Builder:
        """Return a builder for a nested graph that shares the weights and constants of the enclosing graph."""
        return Builder(self.weights, self.floats, self._constants)

    @property
    def initialisers(self) -> list[ir.Value]:
        """All initialisers of the graph: first the weights, then the constants created for nodes."""
        return [*self.weights.values(), *self._constants.values()]

    def weight(self, name: str) -> ir.Value:
        """The initialiser ``name``.

        Raises KeyError if the planned ONNX model contains no initialiser called ``name``.
        """
        return self.weights[name]

    def constant(self, *numbers: int, scalar: bool = False) -> ir.Value:
        """Return an int64 vector or scalar constant that is stored in the model file.

        Equal constants are stored only once.
        """
        name = ("scalar_" if scalar else "vector_") + "_".join(map(str, numbers)).replace("-", "minus")
        return self.array(name, np.array(numbers[0] if scalar else numbers, np.int64))

    def number(self, value: float) -> ir.Value:
        """Return a scalar constant in the dtype of the activations, stored in the model file.

        Equal constants are stored only once.
        """
        return self.array(f"number_{value!r}", np.array(value, self.floats.numpy()))

    @property
    def truth(self) -> ir.Value:
        """The boolean scalar true."""
        return self.array("true", np.array(True))

    def array(self, name: str, value: npt.NDArray[Any]) -> ir.Value:
        """Store the array ``value`` in the model file as a constant named ``name``."""
        if name not in self._constants:
            self._constants[name] = initialiser(ir.Tensor(value, name=name))
        return self._constants[name]

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, *, domain: str = "", **attributes: Attribute
    ) -> ir.Value:
        """Append a node with a single output, and return the output."""
        return self.ops(op_type, inputs, name, (name,), domain=domain, **attributes)[0]

    def cast(self, x: ir.Value, source: ir.DataType, target: ir.DataType, name: str) -> ir.Value:
        """Cast ``x`` from the dtype ``source`` to the dtype ``target``.

        Returns ``x`` itself if the two dtypes are equal.
        """
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
        """Append a node with several named outputs, and return the outputs."""
        values = [ir.Value(name=output) for output in outputs]
        self.nodes.append(ir.node(op_type, inputs, attributes, domain=domain, outputs=values, name=name))
        return values


def initialiser(tensor: ir.Tensor[Any] | ir.ExternalTensor) -> ir.Value:
    """Return the ONNX graph value that represents the initialiser ``tensor``."""
    tensor_type = ir.TensorType(tensor.dtype)
    return ir.Value(name=tensor.name, shape=ir.Shape(list(tensor.shape)), type=tensor_type, const_value=tensor)
