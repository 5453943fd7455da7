"""Nodes and values by name: a thin layer over onnx_ir that keeps the graph readable.

A node and its first output carry the same name, which is the module path (``layers.3.self_attn.q_proj``); helper
nodes append a word (``layers.3.mlp.act_fn.sigmoid``).
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
        """``weights``: initialiser name → value. floats: of activations. constants: of the graph around this one."""
        self.nodes: list[ir.Node] = []
        self.floats = floats
        self.weights = weights
        self._constants = {} if constants is None else constants

    def inner(self) -> Builder:
        """A builder of a graph inside this one, whose weights and constants are this one's."""
        return Builder(self.weights, self.floats, self._constants)

    @property
    def initialisers(self) -> list[ir.Value]:
        """Weights first, then the constants that nodes asked for."""
        return [*self.weights.values(), *self._constants.values()]

    def weight(self, name: str) -> ir.Value:
        """The initialiser ``name``. Raises KeyError if the layout has none."""
        return self.weights[name]

    def constant(self, *numbers: int, scalar: bool = False) -> ir.Value:
        """An int64 vector (or scalar) kept inside the model file; equal ones are shared."""
        name = ("scalar_" if scalar else "vector_") + "_".join(map(str, numbers)).replace("-", "minus")
        return self.array(name, np.array(numbers[0] if scalar else numbers, np.int64))

    def number(self, value: float) -> ir.Value:
        """A scalar in the floats of the activations, kept inside the model file; equal ones are shared."""
        return self.array(f"number_{value!r}", np.array(value, self.floats.numpy()))

    @property
    def truth(self) -> ir.Value:
        """A scalar that is true."""
        return self.array("true", np.array(True))

    def array(self, name: str, value: npt.NDArray[Any]) -> ir.Value:
        """``value`` kept inside the model file under ``name``."""
        if name not in self._constants:
            self._constants[name] = initialiser(ir.Tensor(value, name=name))
        return self._constants[name]

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, *, domain: str = "", **attributes: Attribute
    ) -> ir.Value:
        """Append a node with one output and return it."""
        return self.ops(op_type, inputs, name, (name,), domain=domain, **attributes)[0]

    def cast(self, x: ir.Value, source: ir.DataType, target: ir.DataType, name: str) -> ir.Value:
        """X, which is of the type ``source``, as ``target``; without a node where they are the same."""
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
        made = [ir.Value(name=output) for output in outputs]
        self.nodes.append(ir.node(op_type, inputs, attributes, domain=domain, outputs=made, name=name))
        return made


def initialiser(tensor: ir.Tensor[Any] | ir.ExternalTensor) -> ir.Value:
    """The graph value that stands for ``tensor``."""
    kind = ir.TensorType(tensor.dtype)
    return ir.Value(name=tensor.name, shape=ir.Shape(list(tensor.shape)), type=kind, const_value=tensor)
