"""The model file after patching: weights inside it, places of those outside, lengths of the vocabulary, provenance.

Nothing is done to a model whose bytes would stay what they are. Sources: onnx.proto3, the operator pages of Reshape
and MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from exporter.errors import NotExpressible
from exporter.patch.onnx.data import DataPatch
from exporter.patch.onnx.evidence import recorded_provenance
from exporter.patch.onnx.part import PartPatch
from exporter.sources.hub.locate import PREFIX
from exporter.sources.onnx.file import OnnxFile
from exporter.sources.onnx.graph import LOGITS, PRODUCTS
from exporter.tensors import Array

_INSTEAD: Final = "ttexport merge ADAPTER --to onnx writes the folder anew"


def patched_model(
    file: OnnxFile,
    patches: Mapping[str, PartPatch],
    data: Mapping[str, DataPatch],
    provenance: Mapping[str, str],
    head: str,
) -> bytes | None:
    """The new content of the model file, None if it stays. patches: by initialiser. data: of each tensor outside.

    head: the matrix in front of the logits. Memory: the model file, some times over.
    Raises NotExpressible for weights that are no raw bytes, and for a graph in which more than the matrices counts
    tokens.
    """
    grown = {name: one for name, one in patches.items() if one.grows}
    told = recorded_provenance(file)
    inside = [one for one in patches.values() if one.tensor.place is None]
    if not grown and not inside and told == provenance:
        return None
    model = file.parse()
    for tensor in model.graph.initializer:
        _patch_tensor(file, tensor, patches.get(tensor.name), data.get(tensor.name))
    if grown:
        _Growth(file, model.graph, grown, head).apply()
    if told != provenance:
        _tell(model, provenance)
    return bytes(model.SerializeToString(deterministic=True))


def _patch_tensor(file: OnnxFile, tensor: TensorProto, patch: PartPatch | None, data: DataPatch | None) -> None:
    if patch and patch.grows:
        tensor.dims[:] = patch.shape
    if tensor.data_location == TensorProto.EXTERNAL:
        if data and data.moved:
            told = {entry.key: entry for entry in tensor.external_data}
            offset = data.offsets[tensor.name]
            if "offset" in told or offset:
                (told.get("offset") or tensor.external_data.add(key="offset")).value = str(offset)
            if patch and "length" in told:
                told["length"].value = str(patch.nbytes)
    elif patch:
        if not tensor.HasField("raw_data"):
            raise NotExpressible(f"{file.path}: {tensor.name}", "its numbers stand one by one", instead=_INSTEAD)
        tensor.raw_data = patch.patched_bytes(tensor.raw_data)


def _tell(model: ModelProto, provenance: Mapping[str, str]) -> None:
    """Our own entries, sorted, behind those of others."""
    others = [(prop.key, prop.value) for prop in model.metadata_props if not prop.key.startswith(PREFIX)]
    del model.metadata_props[:]
    for key, value in [*others, *sorted((f"{PREFIX}{name}", value) for name, value in provenance.items())]:
        model.metadata_props.add(key=key, value=value)


class _Growth:
    """Lengths of the vocabulary in a graph, all the way from the head to the logits."""

    def __init__(self, file: OnnxFile, graph: GraphProto, grown: Mapping[str, PartPatch], head: str) -> None:
        one = next(iter(grown.values()))
        self.file, self.graph, self.grown, self.head = file, graph, grown, head
        self.old, self.new = one.n_tokens, one.size
        self.producers = {output: node for node in graph.node for output in node.output if output}
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.values: set[str] = set()  # those whose last axis counts tokens
        self.renamed: dict[str, str] = {}  # constants that are called by what they say

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
            for other in node.input:
                if node.op_type == "Reshape" and other == node.input[-1]:
                    self._reshape(node)
                elif other in self.tensors:
                    self._require_free(other)
                else:
                    waiting.append(other)

    def _product(self, node: NodeProto) -> None:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "N":
                attribute.i = self.new
        for name in node.input[1:]:
            if name in self.tensors and name not in self.grown:
                self._require_free(name)

    def _require_free(self, name: str) -> None:
        """A bias or scale of the logits has an entry a token, which no adapter brings."""
        if self.old in self.tensors[name].dims:
            raise NotExpressible(
                f"{self.file.path}: {name}",
                f"the vocabulary grows from {self.old} to {self.new}, and no adapter holds new entries of this tensor",
                instead="resize the base with transformers, train on that and export it",
            )

    def _reshape(self, node: NodeProto) -> None:
        """The lengths in the second input of a Reshape: stored, or joined from parts that are."""
        waiting: list[tuple[NodeProto, int]] = [(node, len(node.input) - 1)]
        while waiting:
            user, place = waiting.pop()
            name = user.input[place]
            maker = self.producers.get(name)
            if name in self.tensors:
                user.input[place] = self._constant(name)
            elif maker is not None and maker.op_type == "Constant":
                for attribute in maker.attribute:
                    if attribute.type == AttributeProto.TENSOR:
                        self._replace(attribute.t)
            elif maker is not None and maker.op_type in ("Concat", "Identity", "Cast", "Unsqueeze"):
                waiting += [(maker, number) for number in range(len(maker.input))]

    def _constant(self, name: str) -> str:
        """The name of the constant that says the new length. One that others use too gets a twin of its own."""
        tensor = self.tensors[name]
        value = numpy_helper.to_array(tensor) if tensor.data_location != TensorProto.EXTERNAL else np.zeros(0)
        if self.old not in value:
            return name
        told = _named(np.where(value == self.old, self.new, value)) if name == _named(value) else name
        if _uses(self.graph, name) > 1:
            told = told if told != name else f"{name}.grown"
            if told in self.tensors:
                return told
            tensor = self.graph.initializer.add()
            tensor.CopyFrom(self.tensors[name])
        elif told in self.tensors and told != name:
            self.graph.initializer.remove(tensor)
            return told
        else:
            self.renamed[name] = told
        tensor.name = told
        self._replace(tensor)
        self.tensors[told] = tensor
        return told

    def _replace(self, tensor: TensorProto) -> None:
        value = numpy_helper.to_array(tensor)
        numbers = np.where(value == self.old, self.new, value).astype(value.dtype)
        if tensor.HasField("raw_data"):
            tensor.raw_data = numbers.tobytes()
        else:
            tensor.int64_data[:] = numbers.reshape(-1).tolist()

    def _lengthen(self, value: ValueInfoProto) -> None:
        dims = value.type.tensor_type.shape.dim
        if dims and dims[-1].dim_value == self.old:
            dims[-1].dim_value = self.new


def _named(numbers: Array) -> str:
    """How our own builder names a constant: by what it says."""
    return "vector_" + "_".join(map(str, numbers.reshape(-1).tolist())).replace("-", "minus")


def _uses(graph: GraphProto, name: str) -> int:
    """How many inputs of nodes are ``name``, graphs inside the graph included."""
    return sum(list(node.input).count(name) for node in _nodes(graph))


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            inner: Sequence[GraphProto] = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
            for one in inner:
                yield from _nodes(one)
