"""Recognise tensors of the base checkpoint in an ONNX model by comparing rows.

An ONNX export tool may rename tensors, transpose matrices, concatenate the query, key and value matrices, or stack
experts. Export tools may move rows but do not change the values within a row, so each row of an ONNX matrix is looked
up among all rows of the same layer in the base. If at least half of the rows of an ONNX matrix are found in the base,
all rows of the matrix must be found, in the same order as in the base. If fewer than half of the rows of an ONNX matrix
are found in the base, the matrix is reported as unrecognised.
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
#: How many tensors an export tool may pack into one tensor: 2 for gate and up, 3 for queries, keys and values.
TOGETHER: Final = (2, 3)
#: (number of a tensor of the base, number of a row in the tensor)
Place = tuple[int, int]


@dataclass
class BaseRows:
    """An index of the rows of all base tensors without adapter updates, grouped by storage type and layer."""

    reference: Reference
    _index: dict[tuple[str, str | None], dict[bytes, list[Place]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Select the base tensors without adapter updates, because only these tensors can be recognised by their rows.

        If a tensor has a low-rank update, no row of the sum of base and update equals a row of the base.
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
        """Compare a matrix in an ONNX model with the base, and return a description of the difference.

        Returns "" if the matrix equals a matrix of the base, and None if the matrix is not recognised.
        """
        faults = [self.rows_fault(name, _bytes(rows), storage) for rows in _orientations(value)]
        known = [fault for fault in faults if fault is not None]
        return min(known, key=len) if known else None

    def rows_fault(self, name: str, rows: Array, storage: str) -> str | None:
        """Compare the row bytes of a matrix in an ONNX model with the base, and return a description of the difference.

        Returns "" if the rows equal the rows of a base matrix, and None if the matrix is not recognised.

        rows: the bytes of the stored rows in the storage type ``storage``, of shape (n, bytes).
        """
        layer = self._layer(name)
        index = self._rows(storage, layer)
        places = [index.get(row.tobytes(), []) for row in rows]
        missing = [row for row, row_places in enumerate(places) if not row_places]
        if len(missing) > _MOST * len(places):
            others = [other for other in self.layers if other != layer and layer is not None]
            matching = [other for other in others if all(row.tobytes() in self._rows(storage, other) for row in rows)]
            return f"expected a matrix of layer {layer}, found a matrix of layer {matching[0]}" if matching else None
        if missing:
            matching_rows = len(places) - len(missing)
            return f"row {missing[0]} equals no row of the base, but {matching_rows} other rows equal base rows"
        return _misplaced(places, self.sizes)

    def vector_fault(self, name: str, value: Array) -> str | None:
        """Compare a 1-D tensor in an ONNX model with the base, and return a description of the difference.

        Returns "" if there is no difference: the tensor equals a 1-D tensor of the base, or all its elements are equal.
        Returns None if the tensor resembles no tensor of the base. The ONNX tensor is compared with all 1-D tensors of
        the base in the same layer that have the same length. A 1-D ONNX tensor may contain the elements of the base
        tensor in a different order.
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
        return (
            "the 1-D tensor is close to a 1-D tensor of the base, but some elements differ" if nearest < _NEAR else None
        )

    def _layer(self, name: str) -> str | None:
        """Return the layer number in the tensor name ``name``, or None if the base has no layer with this number.

        Some export tools name the final norm as if it belonged to one more layer after the last layer.
        """
        layer = layer_of(name)
        return layer if layer in self.layers else None

    def _vectors(self, layer: str | None, length: int) -> Iterator[Array]:
        """Yield the base's 1-D tensors that belong to ``layer`` and have ``length`` elements.

        Concatenated 1-D tensors, such as the query, key and value biases, are also yielded.
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
    """Return the norm of ``value - want`` divided by the norm of ``want``."""
    return float(np.linalg.norm(value - want)) / max(float(np.linalg.norm(want)), 1e-30)


_FLOAT_NAMES: Final = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.float64): "F64"}


def layer_of(name: str) -> str | None:
    """Return the layer number in a tensor name, or None if the name contains no layer number."""
    match = _LAYER.search(name)
    return match[1] if match else None


def _orientations(value: Array) -> Iterator[Array]:
    """Yield two 2-D arrays with the rows of ``value``, before and after transposing the last two axes."""
    yield value.reshape(-1, value.shape[-1])
    transposed = np.ascontiguousarray(np.swapaxes(value, -1, -2))
    yield transposed.reshape(-1, transposed.shape[-1])


def _bytes(rows: Array) -> Array:
    rows = np.ascontiguousarray(rows)
    return rows.view(np.uint8).reshape(len(rows), -1)


def _follows(place: Place, others: Sequence[Place], sizes: Sequence[int]) -> bool:
    """Whether a row in ``others`` may come directly after the row ``place`` in a concatenation of base tensors.

    In a concatenation of base tensors, the first row of any tensor may follow the last row of a tensor.
    """
    number, row = place
    if row + 1 == sizes[number]:
        return any(first == 0 for _, first in others)
    return (number, row + 1) in others


def _misplaced(places: Sequence[Sequence[Place]], sizes: Sequence[int]) -> str:
    """Return a message if a row of a matrix is in a different place than in the base, or "" if all rows are in order.

    A concatenation of base tensors consists of runs of consecutive base rows, and all run lengths are multiples of a
    number greater than 1. If a single row is in the wrong place, the run lengths have no common divisor greater than 1.
    If several base rows have equal values, a run may continue with any of these base rows. A matrix in which most rows
    start a new run, for example because two halves are interleaved, is accepted as a valid layout.
    """
    starts = [
        row
        for row, (row_places, next_places) in enumerate(pairwise(places), 1)
        if not any(_follows(place, next_places, sizes) for place in row_places)
    ]
    if math.gcd(*starts) != 1 or len(starts) > _MOST * len(places):
        return ""
    return f"expected rows in the base's order, found row {starts[0]} out of order"
