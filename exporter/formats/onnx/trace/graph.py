"""Trace a torch module into an ONNX graph that stores each weight once and uses readable names.

This Python module is imported only in the separate tracing process. In exporter.formats.onnx, only modules of the
tracing process import torch.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.convenience import replace_all_uses_with, replace_nodes_and_values
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter import onnx_fusions

from exporter.formats.onnx.graph.decoder import OPSET

#: Name of the traced modules' attribute that contains the transformers model.
HELD: Final = "model"
_SCOPES: Final = "pkg.torch.onnx.name_scopes"
_TRANSPOSED: Final = (1, 0)

#: Input or output name → names of the dimensions; None keeps the traced name.
Dims = Mapping[str, Sequence[str | None]]


def traced(module: torch.nn.Module, arguments: Sequence[Any], shapes: Any, inputs: Dims, outputs: Dims) -> ir.Model:
    """Trace ``module``, called with the example ``arguments``, into an ONNX model.

    shapes: the dynamic_shapes argument of torch.onnx.export. inputs, outputs: map the name of each graph input or
    output to its dimension names.
    """
    program = torch.onnx.export(
        module,
        tuple(arguments),
        dynamo=True,
        optimize=False,
        opset_version=OPSET,
        dynamic_shapes=shapes,
        input_names=list(inputs),
        output_names=list(outputs),
        verbose=False,
    )
    assert program is not None
    model: ir.Model = program.model
    weights = set(model.graph.initializers)
    # Folding a Transpose of a weight would store a second copy of the weight.
    optimize_ir(model, should_fold=partial(_should_fold, weights))
    onnx_fusions.fuse(model)
    _transpose_weights(model.graph, weights)
    _name(model)
    _name_dims(model.graph, {**inputs, **outputs})
    _strip(model)
    return model


def save(model: ir.Model, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the ONNX file, which contains ``metadata``, and write the weights as external data.

    Peak memory: the size of one transposed weight.
    """
    model.metadata_props.update(metadata)
    ir.save(model, path, external_data=f"{path.name}_data")


def constant(graph: ir.Graph, name: str, *numbers: int) -> ir.Value:
    """Create a constant int64 vector that is stored in the model file."""
    tensor = ir.tensor(np.array(numbers, np.int64), name=name)
    value = ir.Value(name=name, shape=ir.Shape([len(numbers)]), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _should_fold(weights: set[str], node: ir.Node) -> bool | None:
    return False if node.op_type == "Transpose" and _weight(node, weights) else None


def _weight(node: ir.Node, weights: set[str]) -> ir.Value | None:
    """Return the first input of ``node`` if the input is a weight matrix, otherwise None."""
    value = node.inputs[0] if node.inputs else None
    if value is None or value.name not in weights or value.shape is None or len(value.shape) != 2:
        return None
    return value


def _transpose_weights(graph: ir.Graph, weights: set[str]) -> None:
    """Remove the Transpose nodes that the tracer adds for the weights of linear layers.

    The weight matrix is stored transposed, so the graph needs no Transpose node. The matrix of a tied LM head is not
    stored transposed, because the embedding look-up also reads the matrix; the LM head uses a Gemm node with transB=1.
    With a Transpose node, ONNX Runtime would make a transposed copy of the tied matrix at session start.
    """
    transposes: dict[str, list[ir.Node]] = {}
    for node in graph:
        if node.op_type == "Transpose" and (value := _weight(node, weights)):
            transposes.setdefault(str(value.name), []).append(node)
    for name, nodes in transposes.items():
        weight = graph.initializers[name]
        shared = any(user not in nodes for user, _ in weight.uses())
        for node in nodes:
            assert tuple(node.attributes["perm"].as_ints()) == _TRANSPOSED, "expected a Transpose with perm (1, 0)"
            (transposed,) = node.outputs
            if not shared:
                replace_all_uses_with(transposed, weight)
                graph.remove(node, safe=True)
                continue
            for user, _ in list(transposed.uses()):
                if user.op_type == "MatMul":
                    _as_gemm(graph, user, weight)
            if not transposed.uses():
                graph.remove(node, safe=True)
        if not shared:
            _store_transposed(weight)


def _store_transposed(weight: ir.Value) -> None:
    stored = weight.const_value
    assert stored is not None
    assert weight.shape is not None
    shape = ir.Shape(reversed(list(weight.shape)))
    weight.const_value = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(stored.numpy().T), name=weight.name),
        dtype=stored.dtype,
        shape=shape,
        name=weight.name,
    )
    weight.shape = shape


def _as_gemm(graph: ir.Graph, product: ir.Node, weight: ir.Value) -> None:
    """Replace the MatMul that multiplies by the transpose of ``weight`` (V, H) with a Gemm that reads ``weight``."""
    x, (result,) = product.inputs[0], product.outputs
    assert x is not None
    assert weight.shape is not None
    vocab, hidden = (int(length) for length in weight.shape.numpy())
    name = str(result.name)
    rows = ir.node("Reshape", [x, constant(graph, f"{name}.rows.shape", -1, hidden)])
    gemm = ir.node("Gemm", [rows.outputs[0], weight], {"transB": 1})
    lengths = ir.node("Shape", [x], {"start": 0, "end": 2})
    shape = ir.node("Concat", [lengths.outputs[0], constant(graph, f"{name}.width", vocab)], {"axis": 0})
    joined = ir.node("Reshape", [gemm.outputs[0], shape.outputs[0]])
    nodes = [rows, gemm, lengths, shape, joined]
    for node, part in zip(nodes, ("rows", "product", "lengths", "shape", "joined"), strict=True):
        node.name = f"{name}.{part}"
        node.outputs[0].name = node.name
        node.metadata_props.update(product.metadata_props)
    final = joined.outputs[0]
    final.shape, final.type = result.shape, result.type
    replace_nodes_and_values(graph, product, [product], nodes, [result], [final])
    final.name = name


def _name(model: ir.Model) -> None:
    """Name nodes and node outputs by module path, and name weights as in the checkpoint."""
    graph = model.graph
    fixed = {value.name for value in (*graph.inputs, *graph.outputs)}
    for value in list(graph.initializers.values()):
        value.name = str(value.name).removeprefix(f"{HELD}.")
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        module = scopes[-2] if len(scopes) > 1 else ""
        if module != HELD and not module.startswith(f"{HELD}."):
            continue
        at = module.removeprefix(HELD).removeprefix(".")
        node.name = ".".join(filter(None, (at, str(node.outputs[0].name))))
        for value in node.outputs:
            if value.name not in fixed:
                value.name = ".".join(filter(None, (at, str(value.name))))


def _name_dims(graph: ir.Graph, dims: Dims) -> None:
    """Set the dimension names that ONNX clients expect.

    For a dimension that is a sum, such as cached plus new tokens, the tracer generates an arbitrary name.
    """
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        names = dims[str(value.name)]
        value.shape = ir.Shape([name or as_traced for name, as_traced in zip(names, value.shape, strict=True)])


def _strip(model: ir.Model) -> None:
    """Remove the source locations that the tracer adds to nodes, because the locations contain local file paths."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
