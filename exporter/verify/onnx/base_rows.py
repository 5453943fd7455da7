"""The base's tensors by their rows, for models whose tool has its own names and its own packing.

Matrices may be transposed, queries, keys and values in one, experts in a stack. Rows survive all of that, so a matrix
is looked up by its rows among those of the base in the same layer. One in which most rows are found must have all of
them, and at their places; one in which few are found is of a form that is not known here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, permutations
from typing import Final

import numpy as np

from exporter.sources.hf.safetensors import FileTensor
from exporter.tensors import Array, cast, read
from exporter.verify.expect.reference import Reference
from exporter.verify.stored.onnx_blocks import BlockStorage

_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
#: Rows of a matrix, or numbers of a vector, that are found at their places: with fewer it is another one.
_MOST: Final = 0.5
#: A vector so near to one of the base, by the norm of the difference as a share, is meant to be that.
_NEAR: Final = 0.25
#: So many vectors are packed in one: gate and up; queries, keys and values.
TOGETHER: Final = (2, 3)
#: (tensor of the base, row in it)
Place = tuple[int, int]


@dataclass
class BaseRows:
    """The base's tensors, and by storage and layer the places of every row."""

    reference: Reference
    _index: dict[tuple[str, str | None], dict[bytes, list[Place]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Tensors with updates are sums that no row of the base is equal to."""
        vocabulary = {self.reference.checkpoint.tie.embedding, self.reference.checkpoint.tie.head}
        self.tensors = {
            name: want.source
            for name, want in self.reference.tensors.items()
            if not want.computed and name not in vocabulary
        }
        self.layers = sorted({layer for name in self.tensors if (layer := layer_of(name)) is not None})
        shapes = [tensor.spec.shape for tensor in self.tensors.values()]
        self.sizes = [math.prod(shape[:-1]) for shape in shapes]

    def matrix_fault(self, name: str, value: Array, kind: str) -> str | None:
        """The empty text for a matrix of the base, None for one of another form, else what is wrong with it."""
        verdicts = [self.rows_fault(name, _bytes(rows), kind) for rows in _orientations(value)]
        known = [verdict for verdict in verdicts if verdict is not None]
        return min(known, key=len) if known else None

    def rows_fault(self, name: str, rows: Array, kind: str) -> str | None:
        """rows: (n, bytes), as stored in ``kind``."""
        layer = self._layer(name)
        index = self._rows(kind, layer)
        places = [index.get(row.tobytes(), []) for row in rows]
        missing = [row for row, found in enumerate(places) if not found]
        if len(missing) > _MOST * len(places):
            others = [other for other in self.layers if other != layer and layer is not None]
            inside = [other for other in others if all(row.tobytes() in self._rows(kind, other) for row in rows)]
            return f"it is of layer {inside[0]} of the base" if inside else None
        if missing:
            return f"row {missing[0]} is not the base's, {len(places) - len(missing)} others are"
        return _misplaced(places, self.sizes)

    def vector_fault(self, name: str, value: Array) -> str | None:
        """Compared with the vectors of the layer of its length, in order, and in any order."""
        if (value == value[0]).all():
            return ""  # a constant of the graph
        stored, near = _FLOAT_NAMES[value.dtype], math.inf
        bits = value.view(f"u{value.itemsize}")
        for other in self._vectors(self._layer(name), len(value)):
            for one in (other, other + np.float32(1)):  # Gemma's norms, with what is added to them
                rounded = cast(one, stored)
                want = rounded.view(bits.dtype)
                share = float((want == bits).mean())
                if (np.sort(want) == np.sort(bits)).all() and (share == 1 or share <= _MOST):
                    return ""
                off = 0.0 if share > _MOST else _distance(cast(value, "F64"), cast(rounded, "F64"))
                near = min(near, off)
        return "it is almost a vector of the base" if near < _NEAR else None

    def _layer(self, name: str) -> str | None:
        """The layer of the base that a name is about; some tools number the final norm as one layer more."""
        layer = layer_of(name)
        return layer if layer in self.layers else None

    def _vectors(self, layer: str | None, length: int) -> Iterator[Array]:
        """Vectors of the layer of this length, and then neighbours in one: the biases of queries, keys and values."""
        neighbours: dict[tuple[str, str], list[FileTensor]] = {}
        for name, tensor in self.tensors.items():
            if len(tensor.spec.shape) != 1 or layer_of(name) != layer:
                continue
            if tensor.spec.shape == (length,):
                yield cast(read(tensor), "F32")
            module, _, parameter = name.rpartition(".")
            neighbours.setdefault((module.rpartition(".")[0], parameter), []).append(tensor)
        for group in neighbours.values():
            for several in (order for count in TOGETHER for order in permutations(group, count)):
                if sum(one.spec.n_rows for one in several) == length:
                    yield np.concatenate([cast(read(one), "F32") for one in several])

    def _rows(self, kind: str, layer: str | None) -> Mapping[bytes, list[Place]]:
        if (kind, layer) not in self._index:
            found = self._index.setdefault((kind, layer), {})
            for number, (name, tensor) in enumerate(self.tensors.items()):
                if layer_of(name) != layer:
                    continue
                value = read(tensor)
                value = value.reshape(-1, value.shape[-1])
                rows = (
                    BlockStorage.parse(kind).encode(value) if BlockStorage.is_name(kind) else _bytes(cast(value, kind))
                )
                for row, content in enumerate(rows):
                    found.setdefault(content.tobytes(), []).append((number, row))
        return self._index[kind, layer]


def _distance(found: Array, want: Array) -> float:
    """Norm of the difference as a share of the norm."""
    return float(np.linalg.norm(found - want)) / max(float(np.linalg.norm(want)), 1e-30)


_FLOAT_NAMES: Final = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.float64): "F64"}


def layer_of(name: str) -> str | None:
    """The number of the layer that a name is about."""
    match = _LAYER.search(name)
    return match[1] if match else None


def _orientations(value: Array) -> Iterator[Array]:
    """Rows of the last axis, as stored and with the last two axes turned."""
    yield value.reshape(-1, value.shape[-1])
    turned = np.ascontiguousarray(np.swapaxes(value, -1, -2))
    yield turned.reshape(-1, turned.shape[-1])


def _bytes(rows: Array) -> Array:
    rows = np.ascontiguousarray(rows)
    return rows.view(np.uint8).reshape(len(rows), -1)


def _follows(place: Place, others: Sequence[Place], sizes: Sequence[int]) -> bool:
    """Whether one of ``others`` comes next: the row behind, or behind the last one the first of another tensor."""
    number, row = place
    if row + 1 == sizes[number]:
        return any(first == 0 for _, first in others)
    return (number, row + 1) in others


def _misplaced(places: Sequence[Sequence[Place]], sizes: Sequence[int]) -> str:
    """Rows that follow each other in the base follow each other here, in runs of one length where they were packed.

    Equal rows have several places; a step that any of them explains is one. A row out of its place makes runs of all
    lengths; an order without any runs, such as halves that are interleaved, is another one.
    """
    starts = [
        row
        for row, (one, other) in enumerate(pairwise(places), 1)
        if not any(_follows(place, other, sizes) for place in one)
    ]
    if math.gcd(*starts) != 1 or len(starts) > _MOST * len(places):
        return ""
    return f"row {starts[0]} is not at the base's place"
