"""Checks of an ONNX model's other initialisers, those beside the vocabulary, against base and adapters, every one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from exporter.sources.onnx.file import OnnxFile
from exporter.tensors import FLOATS
from exporter.verify.expect.reference import Reference
from exporter.verify.onnx.base_rows import BaseRows
from exporter.verify.onnx.base_sums import BaseSums
from exporter.verify.onnx.matrices import beside_vocabulary, matrices
from exporter.verify.onnx.rotary import check_rotary
from exporter.verify.report import Check, Skip


def check_weights(path: Path, reference: Reference, base: BaseRows) -> Iterator[Check | Skip]:
    """Yield the checks of one model file; ``base`` serves all that are judged. Memory: some tensors, and its index."""
    file = OnnxFile.open(path)
    stored = {one.name: one for one in matrices(file)}
    sums = BaseSums(reference)
    wrong: list[str] = []
    unknown: list[str] = []
    names = list(beside_vocabulary(file))
    for name in names:
        one = file.initialisers[name]
        if name in stored and stored[name].kind not in FLOATS:
            verdict = base.rows_fault(name, stored[name].raw(), stored[name].kind)
        elif len(one.shape) == 1:
            verdict = base.vector_fault(name, file.rows(name, 0, one.shape[0]))
        else:
            verdict = base.matrix_fault(name, file.rows(name, 0, one.shape[0]), one.dtype)
        if verdict is None and name in stored:
            verdict = sums.judge(name, stored[name].raw(), stored[name].kind)
        if verdict is None:
            unknown.append(name)
        elif verdict:
            wrong.append(f"{name}: {verdict}")
    detail = wrong[0] if wrong else f"{len(names) - len(unknown)} initialisers as base and adapters give them"
    yield Check(name="other tensors", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)
    if unknown:
        yield Skip("other tensors", f"{len(unknown)}, such as {unknown[0]}, are of another form: their logits judge")
    yield from check_rotary(file, reference)
