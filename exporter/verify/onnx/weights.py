"""Check all weights of an ONNX model, except embedding and head, against the base checkpoint and the adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from exporter.sources.onnx.file import OnnxFile
from exporter.tensors import FLOATS
from exporter.verify.expect.reference import Reference
from exporter.verify.onnx.base_rows import BaseRows
from exporter.verify.onnx.base_sums import BaseSums
from exporter.verify.onnx.matrices import inner_initialisers, matrices
from exporter.verify.onnx.rotary import check_rotary
from exporter.verify.report import Check, Skip


def check_weights(path: Path, reference: Reference, base: BaseRows) -> Iterator[Check | Skip]:
    """Yield the checks of the weights in one ONNX model file.

    base: an index of the base checkpoint's rows, which is built once and used for all model files.

    Peak memory: a few tensors of the model, plus the index ``base``.
    """
    file = OnnxFile.open(path)
    known = {tensor.name: tensor for tensor in matrices(file)}
    sums = BaseSums(reference)
    wrong: list[str] = []
    unknown: list[str] = []
    names = list(inner_initialisers(file))
    for name in names:
        tensor = file.initialisers[name]
        if name in known and known[name].storage not in FLOATS:
            fault = base.rows_fault(name, known[name].raw(), known[name].storage)
        elif len(tensor.shape) == 1:
            fault = base.vector_fault(name, file.rows(name, 0, tensor.shape[0]))
        else:
            fault = base.matrix_fault(name, file.rows(name, 0, tensor.shape[0]), tensor.dtype)
        if fault is None and name in known:
            fault = sums.fault(name, known[name].raw(), known[name].storage)
        if fault is None:
            unknown.append(name)
        elif fault:
            wrong.append(f"{name}: {fault}")
    detail = wrong[0] if wrong else f"{len(names) - len(unknown)} initialisers match base and adapters"
    yield Check(name="other tensors", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)
    if unknown:
        yield Skip(
            "other tensors",
            f"{len(unknown)} unrecognised tensors, such as {unknown[0]}, "
            "can be verified only by comparing the model's logits",
        )
    yield from check_rotary(file, reference)
