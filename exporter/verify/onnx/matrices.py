"""The matrices of an ONNX model beside the vocabulary, by rows: floats, or blocks of integers with their scales."""

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

#: Smaller tensors are numbers and shapes of the graph.
FEWEST: Final = 4


@dataclass(frozen=True)
class OnnxMatrix:
    """One matrix; ``parts`` are its initialisers, codes before what is beside them. Blocks are (out, in)."""

    name: str
    kind: str
    file: OnnxFile
    parts: Sequence[str]

    def raw(self) -> Array:
        """(n, bytes), as the parts lie side by side."""
        sides = [self.file.rows(name, 0, self.file.initialisers[name].shape[0]) for name in self.parts]
        count = len(sides[0])
        return np.concatenate([np.ascontiguousarray(one).view(np.uint8).reshape(count, -1) for one in sides], axis=1)

    def places(self) -> list[ByteRange] | None:
        """Where each part lies; None if some are inside the model file."""
        found = [self.file.initialisers[name].place for name in self.parts]
        outside = [place for place in found if place is not None]
        return outside if len(outside) == len(found) else None

    def split(self, raw: Array) -> list[Array]:
        """What ``raw`` joins, by part."""
        widths = [self.file.initialisers[name].nbytes // len(raw) for name in self.parts]
        return np.split(raw, np.cumsum(widths)[:-1], axis=1)


def beside_vocabulary(file: OnnxFile) -> Iterator[str]:
    """Initialisers that are neither of embedding or head, nor a table of rotations, nor beside the codes of blocks."""
    blocked = _blocked(file)
    beside = {part for one in blocked.values() for part in one.parts[1:]}
    vocabulary = {part.name for use in (file.embedding, file.head) if use for part in file.stored_tensors(use)}
    for name, one in file.initialisers.items():
        numbers = name in blocked or (one.dtype in FLOATS and np.prod(one.shape) >= FEWEST)
        if numbers and name not in vocabulary | beside and not is_rotary(name):
            yield name


def matrices(file: OnnxFile) -> Iterator[OnnxMatrix]:
    """Those in blocks, and those of floats, beside the vocabulary."""
    blocked = _blocked(file)
    for name in beside_vocabulary(file):
        one = file.initialisers[name]
        if name in blocked:
            yield blocked[name]
        elif len(one.shape) == 2:
            yield OnnxMatrix(name, one.dtype, file, (name,))


def _blocked(file: OnnxFile) -> dict[str, OnnxMatrix]:
    found = {}
    for node in onnx.load(str(file.path), load_external_data=False).graph.node:
        if node.op_type != "MatMulNBits":
            continue
        numbers = {attribute.name: attribute.i for attribute in node.attribute}
        names = [name for name in node.input[1:4] if name]
        if all(name in file.initialisers for name in names) and numbers.get("bits") in (4, 8):
            scales = file.initialisers[names[1]].dtype
            kind = BlockStorage(numbers["bits"], numbers["block_size"], len(names) > 2, scales)
            found[names[0]] = OnnxMatrix(names[0], str(kind), file, tuple(names))
    return found
