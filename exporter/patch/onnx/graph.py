"""Patches an ONNX model file: updates inline weights, offsets of external data, vocabulary sizes, and provenance.

Sources for the file format: onnx.proto3, and the documentation of the ONNX operators Reshape and MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from exporter.errors import NotExpressible
from exporter.patch.evidence import recorded_provenance
from exporter.patch.onnx.data import DataPatch
from exporter.patch.onnx.initialiser import InitialiserPatch
from exporter.patch.onnx.refusal import refusal
from exporter.sources.hub.locate import PREFIX
from exporter.sources.onnx.file import OnnxFile
from exporter.sources.onnx.graph import LOGITS, PRODUCTS
from exporter.tensors import Array


def patched_model(
    file: OnnxFile,
    patches: Mapping[str, InitialiserPatch],
    data: Mapping[str, DataPatch],
    provenance: Mapping[str, str],
) -> bytes | None:
    """Return the new content of the ONNX model file, or None if the file does not change.

    patches: maps the name of each patched initialiser to its patch. data: maps the name of an initialiser to the patch
    of the external data file that contains the initialiser. Peak memory: a few times the size of the model file. Raises
    NotExpressible if the values of a vocabulary matrix are in a protobuf field other than raw_data. Raises
    NotExpressible if the vocabulary grows and the graph contains a further tensor with one entry per token, such as a
    bias of the LM head.
    """
    grown = {name: patch for name, patch in patches.items() if patch.grows}
    inside = any(patch.tensor.place is None for patch in patches.values())
    moved = recorded_provenance(file.metadata) != provenance
    if not grown and not inside and not moved:
        return None
    model = file.parse()
    for tensor in model.graph.initializer:
        _patch_tensor(file, tensor, patches.get(tensor.name), data.get(tensor.name))
    if grown:
        _Growth(file, model.graph, grown).apply()
    if moved:
        _set_provenance(model, provenance)
    return bytes(model.SerializeToString(deterministic=True))


def _patch_tensor(file: OnnxFile, tensor: TensorProto, patch: InitialiserPatch | None, data: DataPatch | None) -> None:
    if patch and patch.grows:
        tensor.dims[:] = patch.shape
    if tensor.data_location == TensorProto.EXTERNAL:
        if data and data.moved:
            entries = {entry.key: entry for entry in tensor.external_data}
            offset = data.offsets[tensor.name]
            if "offset" in entries or offset:
                (entries.get("offset") or tensor.external_data.add(key="offset")).value = str(offset)
            if patch and "length" in entries:
                entries["length"].value = str(patch.nbytes)
    elif patch:
        if not tensor.HasField("raw_data"):
            raise refusal(
                f"{file.path}: {tensor.name}",
                "expected the values of the tensor in raw_data, found values in a typed field such as float_data",
            )
        tensor.raw_data = patch.patched_bytes(tensor.raw_data)


def _set_provenance(model: ModelProto, provenance: Mapping[str, str]) -> None:
    """Replace ttexport's metadata entries, and place them, sorted by key, after the metadata entries of other tools."""
    others = [(prop.key, prop.value) for prop in model.metadata_props if not prop.key.startswith(PREFIX)]
    del model.metadata_props[:]
    for key, value in [*others, *sorted((f"{PREFIX}{name}", value) for name, value in provenance.items())]:
        model.metadata_props.add(key=key, value=value)


class _Growth:
    """Changes the vocabulary size in all shapes and constants of the graph between the LM head and the logits."""

    def __init__(self, file: OnnxFile, graph: GraphProto, grown: Mapping[str, InitialiserPatch]) -> None:
        patch = next(iter(grown.values()))
        self.file, self.graph, self.grown = file, graph, grown
        self.old, self.new = patch.n_tokens, patch.vocab
        self.producers = {output: node for node in graph.node for output in node.output if output}
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.values: set[str] = set()  # names of values whose last axis is the token axis
        self.renamed: dict[str, str] = {}  # old → new name of constants that are named after their numbers

    def apply(self) -> None:
        outputs = [value.name for value in self.graph.output]
        self._follow("logits" if "logits" in outputs else outputs[0])
        for value in (*self.graph.output, *self.graph.value_info, *self.graph.input):
            value.name = self.renamed.get(value.name, value.name)
            if value.name in self.values:
                self._lengthen(value)
            elif value.name in self.grown:
                for dim, length in zip(value.type.tensor_type.shape.dim, self.grown[value.name].shape, strict=False):
                    dim.dim_value = length

    def _follow(self, start: str) -> None:
        waiting = [start]
        while waiting:
            name = waiting.pop()
            node = self.producers.get(name)
            if node is None or name in self.values:
                continue
            self.values.add(name)
            if node.op_type in PRODUCTS:
                self._product(node)
            if node.op_type not in LOGITS:
                continue
            for source in node.input:
                if node.op_type == "Reshape" and source == node.input[-1]:
                    self._reshape(node)
                elif source in self.tensors:
                    self._require_free(source)
                else:
                    waiting.append(source)

    def _product(self, node: NodeProto) -> None:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "N":
                attribute.i = self.new
        for name in node.input[1:]:
            if name in self.tensors and name not in self.grown:
                self._require_free(name)

    def _require_free(self, name: str) -> None:
        """Raise NotExpressible if the tensor ``name`` has one entry per token: no adapter contains the new entries."""
        if self.old in self.tensors[name].dims:
            raise NotExpressible(
                f"{self.file.path}: {name}",
                f"the vocabulary grows from {self.old} to {self.new}, "
                "but no adapter contains new values for this tensor",
                instead="resize the base with transformers, train on the resized base and export the result",
            )

    def _reshape(self, node: NodeProto) -> None:
        """Change the vocabulary size in the shape input of a Reshape node (a constant or a Concat of constants)."""
        waiting: list[tuple[NodeProto, int]] = [(node, len(node.input) - 1)]
        while waiting:
            user, place = waiting.pop()
            name = user.input[place]
            producer = self.producers.get(name)
            if name in self.tensors:
                user.input[place] = self._constant(name)
            elif producer is not None and producer.op_type == "Constant":
                for attribute in producer.attribute:
                    if attribute.type == AttributeProto.TENSOR:
                        self._replace(attribute.t)
            elif producer is not None and producer.op_type in ("Concat", "Identity", "Cast", "Unsqueeze"):
                waiting += [(producer, number) for number in range(len(producer.input))]

    def _constant(self, name: str) -> str:
        """Change the vocabulary size in the constant ``name``. Returns the name of the changed constant.

        If several nodes use the constant, the function adds a changed copy under a new name.
        """
        tensor = self.tensors[name]
        numbers = numpy_helper.to_array(tensor) if tensor.data_location != TensorProto.EXTERNAL else np.zeros(0)
        if self.old not in numbers:
            return name
        new_name = _named(np.where(numbers == self.old, self.new, numbers)) if name == _named(numbers) else name
        if _uses(self.graph, name) > 1:
            new_name = new_name if new_name != name else f"{name}.grown"
            if new_name in self.tensors:
                return new_name
            tensor = self.graph.initializer.add()
            tensor.CopyFrom(self.tensors[name])
        elif new_name in self.tensors and new_name != name:
            self.graph.initializer.remove(tensor)
            return new_name
        else:
            self.renamed[name] = new_name
        tensor.name = new_name
        self._replace(tensor)
        self.tensors[new_name] = tensor
        return new_name

    def _replace(self, tensor: TensorProto) -> None:
        old = numpy_helper.to_array(tensor)
        numbers = np.where(old == self.old, self.new, old).astype(old.dtype)
        if tensor.HasField("raw_data"):
            tensor.raw_data = numbers.tobytes()
        else:
            tensor.int64_data[:] = numbers.reshape(-1).tolist()

    def _lengthen(self, value: ValueInfoProto) -> None:
        dims = value.type.tensor_type.shape.dim
        if dims and dims[-1].dim_value == self.old:
            dims[-1].dim_value = self.new


def _named(numbers: Array) -> str:
    """Return the name that ttexport's ONNX writer would choose for a constant with the values ``numbers``."""
    return "vector_" + "_".join(map(str, numbers.reshape(-1).tolist())).replace("-", "minus")


def _uses(graph: GraphProto, name: str) -> int:
    """Number of node inputs, in the graph and its subgraphs, that refer to the value ``name``."""
    return sum(list(node.input).count(name) for node in _nodes(graph))


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            graphs: Sequence[GraphProto] = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
            for subgraph in graphs:
                yield from _nodes(subgraph)
