"""Write a planned ONNX folder: the graph and external data of each precision, the config and the tokenizer files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir

from exporter.errors import BadInput, OutputError, in_tensor, writing
from exporter.formats.onnx.graph.builder import initialiser
from exporter.formats.onnx.graph.decoder import IR_VERSION, build
from exporter.formats.onnx.plan import OnnxLayout, PlacedInitialiser, Variant
from exporter.io.output import OutputFile
from exporter.io.staging import write_file
from exporter.merge.model import MergedModel
from exporter.progress import Progress, silent
from exporter.tensors import ByteRange, blocks, cast
from exporter.version import __version__

FOLDER: Final = "onnx"
MODEL: Final = "model.onnx"
MODEL_SUFFIX: Final = ".onnx"
#: Name of the external data file of ``model.onnx``. transformers.js expects the data file beside the model file.
DATA: Final = "model.onnx_data"
DATA_SUFFIX: Final = ".onnx_data"

_TYPES: Final = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "U8": ir.DataType.UINT8}


def write_onnx(layout: OnnxLayout, out: Path, progress: Progress = silent) -> None:
    """Write ``layout`` to the new or empty folder ``out``. Writing equal layouts gives byte-identical files.

    Peak memory: the size of the largest linear layer plus a few megabytes; the embedding is never loaded as a whole.
    Raises OutputError if ``out`` is not empty or a write fails. Raises BadInput if the checkpoint has changed since
    planning, or if a precision cannot represent a value. If an error occurs, the content of ``out`` is removed.
    """
    with _fresh(out):
        folder = out / FOLDER
        with writing(folder):
            folder.mkdir()
        for variant in layout.variants:
            _write_variant(layout, variant, folder, progress)
        for name, content in sorted(layout.files.items()):
            write_file(out / name, content)


def graph_bytes(layout: OnnxLayout, variant: Variant, data: str) -> bytes:
    """Serialise an ONNX model: the graph, references to the external data file ``data``, and the provenance."""
    weights = {placed.value.name: initialiser(_external(placed, data)) for placed in variant.initialisers}
    floats = _TYPES[variant.precision.floats]
    graph = build(layout.spec, weights, tied=layout.model.tie.tied, floats=floats, ops=layout.ops)
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="ttexport", producer_version=__version__)
    model.metadata_props.update({f"ttexport.{key}": value for key, value in sorted(layout.model.provenance.items())})
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def _external(placed: PlacedInitialiser, data: str) -> ir.ExternalTensor:
    value = placed.value
    return ir.ExternalTensor(
        data, placed.offset_bytes, placed.nbytes, _TYPES[value.dtype], shape=ir.Shape(value.shape), name=value.name
    )


def _write_variant(layout: OnnxLayout, variant: Variant, folder: Path, progress: Progress) -> None:
    """Write the ONNX model of a precision, with its external data file, once for each file name stem.

    If a precision has several stems, the data file is copied, because onnx.load refuses hard-linked data files for
    security reasons.
    """
    first, *others = (folder / f"{stem}{DATA_SUFFIX}" for stem in variant.precision.stems)
    with OutputFile(first, progress, nbytes=variant.nbytes) as file:
        _write_data(layout, variant, file)
    for other in others:
        with OutputFile(other, progress, nbytes=variant.nbytes) as file:
            file.copy(ByteRange(first, 0, variant.nbytes))
    for stem in variant.precision.stems:
        write_file(folder / f"{stem}{MODEL_SUFFIX}", graph_bytes(layout, variant, f"{stem}{DATA_SUFFIX}"))


def _write_data(layout: OnnxLayout, variant: Variant, file: OutputFile) -> None:
    ledger = layout.model.ledger()
    for placed in variant.initialisers:
        file.write(bytes(placed.offset_bytes - file.nbytes))
        _write_initialiser(layout.model, placed, file)
        for name in placed.sources:
            ledger.take(name, placed.value.rule)
    for name, rule in layout.dropped.items():
        ledger.take(name, rule)
    ledger.close()


def _write_initialiser(model: MergedModel, placed: PlacedInitialiser, file: OutputFile) -> None:
    try:
        file.write_segments(placed.value.segments(), placed.nbytes)
    except BadInput as exc:
        name = _culprit(model, placed) if exc.path is None else None
        if name is None:
            raise
        with in_tensor(model.where(name), name):
            raise


def _culprit(model: MergedModel, placed: PlacedInitialiser) -> str | None:
    """Find the checkpoint tensor with the value that the initialiser cannot represent, and return the tensor's name.

    If the initialiser is made from a single checkpoint tensor, the name is returned without reading the tensor.
    """
    if len(placed.sources) > 1:
        dtype = "F16" if placed.value.dtype == "F16" else "F32"
        for name in placed.sources:
            if not all(np.isfinite(cast(block, dtype)).all() for _, block in blocks(model.tensor(name))):
                return name
    return next(iter(placed.sources), None)


@contextmanager
def _fresh(out: Path) -> Iterator[None]:
    """Return a context manager that requires ``out`` to be an empty or new folder.

    If the body of the ``with`` statement fails, the content of ``out`` is removed. If the ``with`` statement created
    the folder ``out``, the folder is removed too.
    """
    with writing(out):
        created = not out.exists()
        out.mkdir(exist_ok=True)
        if any(out.iterdir()):
            raise OutputError(out, "expected a new or empty folder, found files in the folder")
    try:
        yield
    except BaseException:
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if created:
            out.rmdir()
        raise
