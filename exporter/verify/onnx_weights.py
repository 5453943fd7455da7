"""Checks of an ONNX model's other initialisers, those beside the vocabulary, against the base: every number of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx

from exporter.sources.onnx import OnnxFile
from exporter.tensors import FLOATS, Array
from exporter.verify.base_rows import BaseRows
from exporter.verify.onnx_blocks import BlockKind
from exporter.verify.onnx_rotary import check_rotary, is_rotary
from exporter.verify.reference import Reference
from exporter.verify.report import Check, Skip

#: Smaller tensors are numbers and shapes of the graph.
_FEWEST: Final = 4


def check_weights(path: Path, reference: Reference, base: BaseRows) -> Iterator[Check | Skip]:
    """Yield the checks of one model file; ``base`` serves all that are judged. Memory: some tensors, and its index."""
    file = OnnxFile.open(path)
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
