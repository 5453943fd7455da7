"""Find the base's tensors by their rows in ONNX models with different tensor names and packing.

An export tool may transpose matrices, pack queries, keys and values into one matrix, or stack experts. Rows stay
intact, so each row of a matrix is looked up among the base's rows in the same layer. If most rows of a matrix are
found, all rows must be found, in the base's order. If few rows are found, the matrix has an unknown form.
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
#: Share of the rows of a matrix, or of the elements of a vector, that must be found to identify the matrix or vector.
_MOST: Final = 0.5
#: A vector is identified as a vector of the base if the norm of the difference is below this share of the norm.
_NEAR: Final = 0.25
#: Numbers of tensors that tools pack into one tensor: 2 for gate and up, 3 for queries, keys and values.
TOGETHER: Final = (2, 3)
#: (number of a tensor of the base, number of a row in the tensor)
Place = tuple[int, int]


@dataclass
class BaseRows:
    """The base's tensors without updates, and an index of their rows by storage and layer."""

    reference: Reference
    _index: dict[tuple[str, str | None], dict[bytes, list[Place]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Select the tensors without updates.

        Tensors with updates are sums, and no row of a sum equals a row of the base.
        """
        vocabulary = {self.reference.checkpoint.tie.embedding, self.reference.checkpoint.tie.head}
        self.tensors = {
            name: want.source
            for name, want in self.reference.tensors.items()
            if not want.computed and name not in vocabulary
        }
        self.layers = sorted({layer for name in self.tensors if (layer := layer_of(name)) is not None})
        shapes = [tensor.spec.shape for tensor in self.tensors.values()]
        self.sizes = [math.prod(shape[:-1]) for shape in shapes]

    def matrix_fault(self, name: str, value: Array, storage: str) -> str | None:
        """Describe the fault of a matrix. Returns "" for a matrix of the base, None for a matrix of unknown form."""
        faults = [self.rows_fault(name, _bytes(rows), storage) for rows in _orientations(value)]
        known = [fault for fault in faults if fault is not None]
        return min(known, key=len) if known else None

    def rows_fault(self, name: str, rows: Array, storage: str) -> str | None:
        """Describe the fault of a matrix given by its rows, as ``matrix_fault`` does.

        rows: stored rows in ``storage``, (n, bytes).
        """
        layer = self._layer(name)
        index = self._rows(storage, layer)
        places = [index.get(row.tobytes(), []) for row in rows]
        missing = [row for row, row_places in enumerate(places) if not row_places]
        if len(missing) > _MOST * len(places):
            others = [other for other in self.layers if other != layer and layer is not None]
            matching = [other for other in others if all(row.tobytes() in self._rows(storage, other) for row in rows)]
            return f"the matrix belongs to layer {matching[0]} of the base" if matching else None
        if missing:
            return f"row {missing[0]} is not in the base, but {len(places) - len(missing)} other rows are"
        return _misplaced(places, self.sizes)

    def vector_fault(self, name: str, value: Array) -> str | None:
        """Describe the fault of a vector. Returns "" for a vector of the base, None for an unknown vector.

        The vector is compared with the base's vectors of equal layer and length, in the base's order of elements and in
        any order.
        """
        if (value == value[0]).all():
            return ""  # a constant of the graph
        stored, nearest = _FLOAT_NAMES[value.dtype], math.inf
        bits = value.view(f"u{value.itemsize}")
        for base_vector in self._vectors(self._layer(name), len(value)):
            for variant in (base_vector, base_vector + np.float32(1)):  # Gemma's norms are stored with 1 added
                rounded = cast(variant, stored)
                want = rounded.view(bits.dtype)
                share = float((want == bits).mean())
                if (np.sort(want) == np.sort(bits)).all() and (share == 1 or share <= _MOST):
                    return ""
                deviation = 0.0 if share > _MOST else _distance(cast(value, "F64"), cast(rounded, "F64"))
                nearest = min(nearest, deviation)
        return "the vector is close to a vector of the base, but differs" if nearest < _NEAR else None

    def _layer(self, name: str) -> str | None:
        """The layer number in a name, or None for a number without a layer in the base.

        Some tools give the final norm an extra layer number.
        """
        layer = layer_of(name)
        return layer if layer in self.layers else None

    def _vectors(self, layer: str | None, length: int) -> Iterator[Array]:
        """Vectors of the layer with ``length`` elements.

        Concatenations, such as the biases of queries, keys and values, are included.
        """
        neighbours: dict[tuple[str, str], list[FileTensor]] = {}
        for name, tensor in self.tensors.items():
            if len(tensor.spec.shape) != 1 or layer_of(name) != layer:
                continue
            if tensor.spec.shape == (length,):
                yield cast(read(tensor), "F32")
            module, _, parameter = name.rpartition(".")
            neighbours.setdefault((module.rpartition(".")[0], parameter), []).append(tensor)
        for group in neighbours.values():
            for ordered in (order for count in TOGETHER for order in permutations(group, count)):
                if sum(tensor.spec.n_rows for tensor in ordered) == length:
                    yield np.concatenate([cast(read(tensor), "F32") for tensor in ordered])

    def _rows(self, storage: str, layer: str | None) -> Mapping[bytes, list[Place]]:
        if (storage, layer) not in self._index:
            places = self._index.setdefault((storage, layer), {})
            for number, (name, tensor) in enumerate(self.tensors.items()):
                if layer_of(name) != layer:
                    continue
                value = read(tensor)
                value = value.reshape(-1, value.shape[-1])
                rows = (
                    BlockStorage.parse(storage).encode(value)
                    if BlockStorage.is_name(storage)
                    else _bytes(cast(value, storage))
                )
                for row, content in enumerate(rows):
                    places.setdefault(content.tobytes(), []).append((number, row))
        return self._index[storage, layer]


def _distance(value: Array, want: Array) -> float:
    """Norm of the difference as a share of the norm of ``want``."""
    return float(np.linalg.norm(value - want)) / max(float(np.linalg.norm(want)), 1e-30)


_FLOAT_NAMES: Final = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.float64): "F64"}


def layer_of(name: str) -> str | None:
    """The layer number in a tensor name, or None."""
    match = _LAYER.search(name)
    return match[1] if match else None


def _orientations(value: Array) -> Iterator[Array]:
    """Yield the rows along the last axis, first as stored, then with the last two axes transposed."""
    yield value.reshape(-1, value.shape[-1])
    transposed = np.ascontiguousarray(np.swapaxes(value, -1, -2))
    yield transposed.reshape(-1, transposed.shape[-1])


def _bytes(rows: Array) -> Array:
    rows = np.ascontiguousarray(rows)
    return rows.view(np.uint8).reshape(len(rows), -1)


def _follows(place: Place, others: Sequence[Place], sizes: Sequence[int]) -> bool:
    """True if ``others`` contains the row after ``place``.

    The first row of any tensor may follow the last row of a tensor.
    """
    number, row = place
    if row + 1 == sizes[number]:
        return any(first == 0 for _, first in others)
    return (number, row + 1) in others


def _misplaced(places: Sequence[Sequence[Place]], sizes: Sequence[int]) -> str:
    """Describe the fault of rows that are not in the base's order. Returns "" for rows in order.

    Packed tensors give runs of consecutive rows with a common length. Equal rows have more than one place, and any
    place may continue a run. A misplaced row gives runs of irregular lengths. An order without runs, such as
    interleaved halves, is a valid layout.
    """
    starts = [
        row
        for row, (row_places, next_places) in enumerate(pairwise(places), 1)
        if not any(_follows(place, next_places, sizes) for place in row_places)
    ]
    if math.gcd(*starts) != 1 or len(starts) > _MOST * len(places):
        return ""
    return f"row {starts[0]} is not in the base's order"
