"""Read the matrices of an ONNX model, except embedding and head, row by row, as floats or as quantised blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx

from exporter.sources.onnx.file import OnnxFile
from exporter.tensors import FLOATS, Array, ByteRange
from exporter.verify.onnx.rotary import is_rotary
from exporter.verify.stored.onnx_blocks import BlockStorage

#: Smallest number of elements of a weight. Smaller tensors are constants and shapes of the graph.
MIN_ELEMENTS: Final = 4


@dataclass(frozen=True)
class OnnxMatrix:
    """One matrix of an ONNX model.

    parts: the names of the initialisers that form the matrix. A block-quantised matrix has the shape (out, in) and is
    stored as separate initialisers for quantised integers, scales and, optionally, zero points.
    """

    name: str
    storage: str
    file: OnnxFile
    parts: Sequence[str]

    def raw(self) -> Array:
        """Concatenate the row bytes of all initialisers to a byte array of shape (rows, total bytes per row)."""
        sides = [self.file.rows(name, 0, self.file.initialisers[name].shape[0]) for name in self.parts]
        count = len(sides[0])
        return np.concatenate([np.ascontiguousarray(side).view(np.uint8).reshape(count, -1) for side in sides], axis=1)

    def places(self) -> list[ByteRange] | None:
        """Return each initialiser's byte range in external data, or None if not all initialisers have external data."""
        places = [self.file.initialisers[name].place for name in self.parts]
        outside = [place for place in places if place is not None]
        return outside if len(outside) == len(places) else None

    def split(self, raw: Array) -> list[Array]:
        """Split row bytes that were returned by the method ``raw`` into one array per initialiser of the matrix."""
        widths = [self.file.initialisers[name].nbytes // len(raw) for name in self.parts]
        return np.split(raw, np.cumsum(widths)[:-1], axis=1)


def inner_initialisers(file: OnnxFile) -> Iterator[str]:
    """Yield the names of all weight initialisers, except embedding, head and rotary tables.

    For a block-quantised matrix, only the name of the initialiser with the quantised integers is yielded.
    """
    blocked = _blocked(file)
    scale_parts = {part for tensor in blocked.values() for part in tensor.parts[1:]}
    vocabulary = {part.name for use in (file.embedding, file.head) if use for part in file.stored_tensors(use)}
    for name, tensor in file.initialisers.items():
        is_weight = name in blocked or (tensor.dtype in FLOATS and np.prod(tensor.shape) >= MIN_ELEMENTS)
        if is_weight and name not in vocabulary | scale_parts and not is_rotary(name):
            yield name


def matrices(file: OnnxFile) -> Iterator[OnnxMatrix]:
    """Yield all matrices of an ONNX model, block-quantised or stored as floats, except embedding and head."""
    blocked = _blocked(file)
    for name in inner_initialisers(file):
        tensor = file.initialisers[name]
        if name in blocked:
            yield blocked[name]
        elif len(tensor.shape) == 2:
            yield OnnxMatrix(name, tensor.dtype, file, (name,))


def _blocked(file: OnnxFile) -> dict[str, OnnxMatrix]:
    matrices_by_name = {}
    for node in onnx.load(str(file.path), load_external_data=False).graph.node:
        if node.op_type != "MatMulNBits":
            continue
        numbers = {attribute.name: attribute.i for attribute in node.attribute}
        names = [name for name in node.input[1:4] if name]
        if all(name in file.initialisers for name in names) and numbers.get("bits") in (4, 8):
            scales = file.initialisers[names[1]].dtype
            storage = BlockStorage(numbers["bits"], numbers["block_size"], len(names) > 2, scales)
            matrices_by_name[names[0]] = OnnxMatrix(names[0], str(storage), file, tuple(names))
    return matrices_by_name
