"""Checks of an ONNX model's other initialisers, those beside the vocabulary, against the base, row by row.

Every tool has its own names and its own packing: matrices transposed, queries, keys and values in one, experts in a
stack. Rows survive all of that, so a matrix is looked up by its rows among those of the base in the same layer. One in
which most rows are found must have all of them, and at their places; one in which few are found is of a form that is
not known here, and its logits judge it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import onnx

from exporter.sources.onnx import OnnxFile
from exporter.tensors import FLOATS, Array, cast, read
from exporter.verify.onnx_blocks import BlockKind
from exporter.verify.onnx_rotary import check_rotary, is_rotary
from exporter.verify.reference import Reference
from exporter.verify.report import Check, Skip

_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
#: Rows of a matrix, or numbers of a vector, that are found at their places: with fewer it is another one.
_MOST: Final = 0.5
#: Smaller tensors are numbers and shapes of the graph.
_FEWEST: Final = 4
#: (tensor of the base, row in it)
Place = tuple[int, int]


def check_weights(path: Path, reference: Reference) -> Iterator[Check | Skip]:
    """Yield the checks of one model file. Memory: a tensor of it and its row in the base; hashes of every row."""
    file = OnnxFile.open(path)
    base = _Base(reference)
    blocked = _blocked(file)
    parts = {name for form in blocked.values() for name in form.parts}
    vocabulary = {part.name for use in (file.embedding, file.head) if use for part in file.parts(use)}
    wrong: list[str] = []
    unknown: list[str] = []
    count = 0
    for name, one in file.initialisers.items():
        if name in vocabulary or (name in parts and name not in blocked) or is_rotary(name):
            continue
        if name not in blocked and (one.dtype not in FLOATS or np.prod(one.shape) < _FEWEST):
            continue
        count += 1
        value = file.rows(name, 0, one.shape[0])
        if name in blocked:
            verdict = base.judge_rows(name, blocked[name].rows(file, value), blocked[name].kind)
        elif len(one.shape) == 1:
            verdict = base.judge_vector(name, value)
        else:
            verdict = base.judge_matrix(name, value, one.dtype)
        if verdict is None:
            unknown.append(name)
        elif verdict:
            wrong.append(f"{name}: {verdict}")
    detail = wrong[0] if wrong else f"{count - len(unknown)} initialisers as in the base"
    yield Check(name="other tensors", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)
    if unknown:
        yield Skip("other tensors", f"{len(unknown)}, such as {unknown[0]}, are of another form: their logits judge")
    yield from check_rotary(file, reference)


@dataclass(frozen=True)
class _Blocked:
    """A matrix in blocks of integers, (out, in): its codes and what belongs to them."""

    kind: BlockKind
    parts: Sequence[str]

    def rows(self, file: OnnxFile, codes: Array) -> Array:
        """Codes, scales and zero points side by side: (out, bytes)."""
        count = len(codes)
        beside = [file.rows(name, 0, file.initialisers[name].shape[0]) for name in self.parts[1:]]
        sides = [np.ascontiguousarray(one).view(np.uint8).reshape(count, -1) for one in (codes, *beside)]
        return np.concatenate(sides, axis=1)


def _blocked(file: OnnxFile) -> dict[str, _Blocked]:
    found = {}
    for node in onnx.load(str(file.path), load_external_data=False).graph.node:
        if node.op_type != "MatMulNBits":
            continue
        numbers = {attribute.name: attribute.i for attribute in node.attribute}
        names = [name for name in node.input[1:4] if name]
        if all(name in file.initialisers for name in names) and numbers.get("bits") in (4, 8):
            scales = file.initialisers[names[1]].dtype
            found[names[0]] = _Blocked(
                BlockKind(numbers["bits"], numbers["block_size"], len(names) > 2, scales), tuple(names)
            )
    return found


@dataclass
class _Base:
    """The base's tensors, and by storage and layer the places of every row."""

    reference: Reference
    index: dict[tuple[str, str | None], dict[bytes, list[Place]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Tensors with updates are sums that no row of the base is equal to."""
        vocabulary = {self.reference.checkpoint.tie.embedding, self.reference.checkpoint.tie.head}
        self.tensors = {
            name: want.source
            for name, want in self.reference.tensors.items()
            if not want.computed and name not in vocabulary
        }
        shapes = [tensor.spec.shape for tensor in self.tensors.values()]
        self.sizes = [math.prod(shape[:-1]) for shape in shapes]

    def judge_matrix(self, name: str, value: Array, kind: str) -> str | None:
        """The empty text for a matrix of the base, None for one of another form, else what is wrong with it."""
        verdicts = [self.judge_rows(name, _bytes(rows), kind) for rows in _orientations(value)]
        known = [verdict for verdict in verdicts if verdict is not None]
        return min(known, key=len) if known else None

    def judge_rows(self, name: str, rows: Array, kind: str | BlockKind) -> str | None:
        """rows: (n, bytes), as stored in ``kind``."""
        index = self._rows(str(kind), _layer(name))
        places = [index.get(row.tobytes(), []) for row in rows]
        missing = [row for row, found in enumerate(places) if not found]
        if len(missing) > _MOST * len(places):
            return None
        if missing:
            return f"row {missing[0]} is not the base's, {len(places) - len(missing)} others are"
        return _misplaced(places, self.sizes)

    def judge_vector(self, name: str, value: Array) -> str | None:
        """Compared with the vectors of the layer of its length, in order, and in any order."""
        if (value == value[0]).all():
            return ""  # a constant of the graph
        best, nearest = _MOST, None
        for other in self._vectors(_layer(name), len(value)):
            for one in (other, other + np.float32(1)):
                same = cast(one, _FLOAT_NAMES[value.dtype]) == value
                for alike in (same, np.sort(cast(one, _FLOAT_NAMES[value.dtype])) == np.sort(value)):
                    if alike.all():
                        return ""
                    if (share := float(alike.mean())) > best and alike is same:
                        best, nearest = share, int(np.flatnonzero(~alike)[0])
        return None if nearest is None else f"number {nearest} is not the base's, {best:.0%} of the others are"

    def _vectors(self, layer: str | None, length: int) -> Iterator[Array]:
        for name, tensor in self.tensors.items():
            if tensor.spec.shape == (length,) and _layer(name) == layer:
                yield cast(read(tensor), "F32")

    def _rows(self, kind: str, layer: str | None) -> Mapping[bytes, list[Place]]:
        if (kind, layer) not in self.index:
            found = self.index.setdefault((kind, layer), {})
            for number, (name, tensor) in enumerate(self.tensors.items()):
                if _layer(name) != layer:
                    continue
                value = read(tensor)
                value = value.reshape(-1, value.shape[-1])
                rows = BlockKind.read(kind).encode(value) if BlockKind.is_one(kind) else _bytes(cast(value, kind))
                for row, content in enumerate(rows):
                    found.setdefault(content.tobytes(), []).append((number, row))
        return self.index[kind, layer]


_FLOAT_NAMES: Final = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.float64): "F64"}


def _layer(name: str) -> str | None:
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
