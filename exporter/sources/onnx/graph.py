"""Finds two matrices in an ONNX graph: the embedding, indexed by token ids, and the head, which computes the logits.

Embedding and head are found by the structure of the graph, because each export tool gives the weights different names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from onnx import GraphProto, NodeProto

#: Operators that may stand between the token ids and the Gather.
_IDS: Final = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
#: Operators that may stand between an initialiser and its use.
_WEIGHT: Final = frozenset({"Cast", "Identity", "DequantizeLinear", "Transpose"})
#: Operators that may stand between scales or zero points and their use.
_RESHAPED: Final = frozenset({"Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
#: Operators that may stand between the head and the logits, for shapes, caps, scales and a bias.
LOGITS: Final = frozenset(
    {"Add", "Cast", "Clip", "Div", "Gather", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Tanh"}
    | {"Transpose", "Unsqueeze"}
)
#: Matrix products with the weight as second input, and the axis of the weight that gives the columns of the result.
PRODUCTS: Final[Mapping[str, int]] = {"MatMul": 1, "Gemm": 1, "FusedMatMul": 1, "MatMulNBits": 0, "MatMulInteger": 1}
#: Operators that identify a quantised graph.
_QUANTISED: Final = frozenset(
    {"MatMulNBits", "GatherBlockQuantized", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul"}
    | {"MatMulIntegerToFloat", "QGemm", "DequantizeLinear"}
)
#: Look-up operators. The first input is the matrix, and the second input is the token ids.
_LOOKUPS: Final = frozenset({"Gather", "GatherBlockQuantized"})
#: Axis attribute of a look-up in a matrix → token axis of the matrix.
_AXES: Final[Mapping[int | None, int]] = {None: 0, 0: 0, 1: 1, -1: 1, -2: 0}
#: Maximum number of nodes between a use and its weight. A limit is needed because a hostile graph may have cycles.
_MAX_STEPS: Final = 16


#: Operator on block-quantised codes → (positions of codes, scales and zero points among the inputs, default block
#: size).
_BLOCKED: Final[Mapping[str, tuple[int, int, int, int]]] = {
    "MatMulNBits": (1, 2, 3, 0),
    "GatherBlockQuantized": (0, 2, 3, 128),
}


@dataclass(frozen=True, slots=True)
class BlockForm:
    """Format of a block-quantised matrix.

    Each code has ``bits`` bits, and each block of ``size`` codes shares one scale. scales, zero_points: names of the
    initialisers that store the scales and the zero points of the blocks.
    """

    bits: int
    size: int
    scales: str
    zero_points: str | None


@dataclass(frozen=True, slots=True)
class ScaledForm:
    """Format of a matrix of scaled integers: each value is (integer - zero point) * scale.

    scale, zero_point: names of the initialisers that store the scale and the zero point. ``zero_point`` is None if the
    format has no zero point.
    """

    scale: str
    zero_point: str | None


@dataclass(frozen=True, slots=True)
class VocabularyMatrix:
    """An initialiser that stores the embedding or the head.

    token_axis: the axis of the initialiser along which the tokens are numbered. The formats ``blocks`` and ``scaled``
    are set only if the initialiser contains quantised codes.
    """

    name: str
    token_axis: int
    blocks: BlockForm | None = None
    scaled: ScaledForm | None = None


@dataclass(frozen=True, slots=True)
class GraphVocabulary:
    """The embedding, the head and the quantisation formats of an ONNX graph.

    ``embedding`` is None if the graph has no embedding, and ``head`` is None if the graph has no head. quantised:
    whether the graph contains an integer matrix product. block_formats: the sorted block formats of all matrices of the
    graph.
    """

    embedding: VocabularyMatrix | None
    head: VocabularyMatrix | None
    quantised: bool
    block_formats: tuple[str, ...]


def find_vocabulary(graph: GraphProto, ranks: Mapping[str, int]) -> GraphVocabulary:
    """Find the embedding and the head in a graph. ranks: maps the name of every initialiser to its number of axes."""
    walk = _Walk(graph, ranks)
    quantised = any(node.op_type in _QUANTISED for node in graph.node)
    return GraphVocabulary(walk.embedding(), walk.head(), quantised, _block_formats(graph))


def _block_formats(graph: GraphProto) -> tuple[str, ...]:
    """Return the sorted block formats of all matrices of the graph, such as "int4 x 32 with zero points".

    Matrices in subgraphs, such as loops over experts, are included.
    """
    waiting, formats = [graph], set[str]()
    while waiting:
        for node in waiting.pop().node:
            waiting += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
            if node.op_type in _BLOCKED:
                _, _, zeros_at, default = _BLOCKED[node.op_type]
                zeros = " with zero points" if any(node.input[zeros_at:][:1]) else ""
                bits, size = _number(node, "bits") or 4, _number(node, "block_size") or default
                formats.add(f"int{bits} x {size}{zeros}")
    return tuple(sorted(formats))


class _Walk:
    def __init__(self, graph: GraphProto, ranks: Mapping[str, int]) -> None:
        self.graph, self.ranks = graph, ranks
        self.producers = {output: node for node in graph.node for output in node.output if output}

    def embedding(self) -> VocabularyMatrix | None:
        for node in self.graph.node:
            if node.op_type in _LOOKUPS and len(node.input) > 1 and self._is_ids(node.input[1]):
                axis = _AXES.get(_number(node, "axis"))
                if axis is not None and (use := self._looked_up(node, axis)):
                    return replace(use, blocks=self._blocks(node), scaled=self._scaled((use.name, node.output[0])))
        return None

    def _looked_up(self, node: NodeProto, axis: int) -> VocabularyMatrix | None:
        """Return the matrix from which the look-up node ``node`` gathers rows.

        If the look-up shares its quantised codes with a matrix product, the codes may be reshaped before the look-up.
        """
        name = self._stored(node.input[0]) if node.op_type in _BLOCKED else None
        return self._weight(name or node.input[0], axis)

    def head(self) -> VocabularyMatrix | None:
        outputs = [value.name for value in self.graph.output]
        if not outputs:
            return None
        start = "logits" if "logits" in outputs else outputs[0]
        return next((use for node in self._behind(start) if (use := self._factor(node))), None)

    def _is_ids(self, name: str) -> bool:
        for _ in range(_MAX_STEPS):
            node = self.producers.get(name)
            if node is None or node.op_type not in _IDS or not node.input:
                break
            name = node.input[0]
        return name == "input_ids"

    def _behind(self, name: str) -> Iterator[NodeProto]:
        """Yield the nearest matrix products on the graph paths that lead to the value ``name``.

        The search continues through nodes that only reshape or scale a value.
        """
        waiting, seen = [name], set[str]()
        while waiting:
            name = waiting.pop()
            node = self.producers.get(name)
            if node is None or name in seen:
                continue
            seen.add(name)
            if node.op_type in PRODUCTS:
                yield node
            elif node.op_type in LOGITS:
                waiting += reversed(node.input)

    def _factor(self, node: NodeProto) -> VocabularyMatrix | None:
        """Return the stored factor of a matrix product, preferably the second factor, or None if no factor is stored.

        The second factor has the shape (hidden, tokens), and the first factor has the shape (tokens, hidden).
        """
        if len(node.input) < 2:
            return None
        second = self._weight(node.input[1], PRODUCTS[node.op_type] ^ bool(_number(node, "transB")))
        if second and node.op_type == "MatMulInteger":
            return replace(second, scaled=self._scaled_after(node))
        if second and node.op_type in _BLOCKED:
            return replace(second, blocks=self._blocks(node))
        if second:
            return replace(second, scaled=self._scaled((second.name,)))
        return self._weight(node.input[0], int(bool(_number(node, "transA"))))

    def _weight(self, name: str, axis: int) -> VocabularyMatrix | None:
        """Return the initialiser from which the value ``name`` is derived, or None if there is no such initialiser.

        If there is a Transpose node between the initialiser and the value ``name``, the token axis is swapped.
        """
        for _ in range(_MAX_STEPS):
            if name in self.ranks:
                return VocabularyMatrix(name, axis) if self.ranks[name] >= 2 else None
            node = self.producers.get(name)
            if node is None or node.op_type not in _WEIGHT or not node.input:
                return None
            axis ^= node.op_type == "Transpose"
            name = node.input[0]
        return None

    def _blocks(self, node: NodeProto) -> BlockForm | None:
        """Return the block format of the quantised codes that ``node`` reads.

        Returns None if ``node`` reads no quantised codes, or if the scales are not stored but computed by the graph.
        """
        if node.op_type not in _BLOCKED:
            return None
        _, scales_at, zeros_at, default = _BLOCKED[node.op_type]
        scales = self._stored(node.input[scales_at]) if len(node.input) > scales_at else None
        zeros = node.input[zeros_at] if len(node.input) > zeros_at else ""
        if scales is None:
            return None
        size = _number(node, "block_size") or default
        return BlockForm(_number(node, "bits") or 4, size, scales, self._stored(zeros) if zeros else None)

    def _scaled(self, names: Sequence[str]) -> ScaledForm | None:
        """Return the format of the first DequantizeLinear node whose input is one of the values ``names``."""
        for node in self.graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] in names and len(node.input) > 1:
                zeros = node.input[2] if len(node.input) > 2 else ""
                if node.input[1] in self.ranks and (not zeros or zeros in self.ranks):
                    return ScaledForm(node.input[1], zeros or None)
        return None

    def _scaled_after(self, product: NodeProto) -> ScaledForm | None:
        """Return the format of the weight in an integer matrix product.

        The scale of the weight is found in the graph after the integer matrix product: the result of the product is
        multiplied by the scales of both factors.
        """
        users = {name: node for node in self.graph.node for name in node.input}
        node = users.get(product.output[0])
        while node is not None and node.op_type == "Cast":
            node = users.get(node.output[0])
        if node is None or node.op_type != "Mul":
            return None
        producers = [self.producers.get(name) for name in node.input]
        products = [node for node in producers if node is not None and node.op_type == "Mul"]
        factors = [name for node in products for name in node.input]
        scale = next((name for name in factors if name in self.ranks), None)
        zeros = product.input[3] if len(product.input) > 3 else ""
        if scale is None or (zeros and zeros not in self.ranks):
            return None
        return ScaledForm(scale, zeros or None)

    def _stored(self, name: str) -> str | None:
        """Return the initialiser of which ``name`` is a reshaped copy, or None if there is no such initialiser."""
        for _ in self.graph.node:
            if name in self.ranks:
                return name
            node = self.producers.get(name)
            if node is None or node.op_type not in _RESHAPED or not node.input:
                return None
            name = node.input[0]
        return None


def _number(node: NodeProto, key: str) -> int | None:
    return next((attribute.i for attribute in node.attribute if attribute.name == key), None)
