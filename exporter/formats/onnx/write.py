"""Writing the planned folder: the data file front to back, then the graph, then what clients read beside it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir

from exporter.errors import OutputError, writing
from exporter.formats.onnx.builder import initialiser
from exporter.formats.onnx.decoder import IR_VERSION, build
from exporter.formats.onnx.plan import Item, OnnxLayout
from exporter.formats.onnx.rope import cache
from exporter.formats.output import OutputFile, Progress, silent
from exporter.staging import write_file
from exporter.tensors import BLOCK_BYTES, Array, ByteRange, LazyTensor, read
from exporter.version import __version__

FOLDER: Final = "onnx"
MODEL: Final = "model.onnx"
#: The one name under which transformers.js looks for the weights of ``model.onnx``.
DATA: Final = "model.onnx_data"

#: Columns that are transposed at once: few enough that source rows and target rows stay in the processor's cache.
_TRANSPOSE_COLUMNS: Final = 64


def write_onnx(layout: OnnxLayout, out: Path, progress: Progress = silent) -> None:
    """Write ``layout`` into the folder ``out``, which is made, or is there and empty; same layout, same bytes.

    Memory: the largest linear (not the embedding, which goes in row blocks) and a few megabytes.
    Raises OutputError if ``out`` holds something or the device refuses, BadInput for a checkpoint that changed;
    nothing is left in ``out`` then.
    """
    with _fresh(out):
        folder = out / FOLDER
        with writing(folder):
            folder.mkdir()
        with OutputFile(folder / DATA, progress, nbytes=layout.nbytes) as file:
            _write_data(layout, file)
        write_file(folder / MODEL, graph_bytes(layout))
        for name, content in sorted(layout.files.items()):
            write_file(out / name, content)


def graph_bytes(layout: OnnxLayout) -> bytes:
    """``model.onnx``: the graph, its weights by reference to ``DATA``, and where it came from."""
    weights = {item.name: initialiser(_external(item)) for item in layout.items}
    graph = build(layout.spec, weights, tied=layout.model.tie.tied)
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="ttexport", producer_version=__version__)
    model.metadata_props.update({f"ttexport.{key}": value for key, value in sorted(layout.model.provenance.items())})
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def _external(item: Item) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        DATA, item.offset_bytes, item.nbytes, ir.DataType.FLOAT, shape=ir.Shape(item.shape), name=item.name
    )


def _write_data(layout: OnnxLayout, file: OutputFile) -> None:
    ledger = layout.model.ledger()
    for item in layout.items:
        file.write(bytes(item.offset_bytes - file.nbytes))
        file.write_segments(_segments(item, layout.spec.max_positions), item.nbytes)
        for name in item.sources:
            ledger.take(name, item.rule)
    for name, rule in layout.dropped.items():
        ledger.take(name, rule)
    ledger.close()


def _segments(item: Item, max_positions: int) -> Iterator[ByteRange | Array]:
    if item.table is not None:
        yield from cache(np.cos if item.part == "cos" else np.sin, item.table, max_positions)
    for tensor in item.tensors:
        yield from _columns(tensor) if item.transposed else tensor.segments()


def _columns(tensor: LazyTensor) -> Iterator[Array]:
    """The columns of a stored matrix as rows, in blocks. Memory: the matrix and one block."""
    value = read(tensor)
    step = max(_TRANSPOSE_COLUMNS, BLOCK_BYTES // max(1, len(value) * value.itemsize))
    for start in range(0, value.shape[1], step):
        block = np.empty((min(step, value.shape[1] - start), len(value)), value.dtype)
        for column in range(0, len(block), _TRANSPOSE_COLUMNS):
            last = min(column + _TRANSPOSE_COLUMNS, len(block))
            block[column:last] = value[:, start + column : start + last].T
        yield block


@contextmanager
def _fresh(out: Path) -> Iterator[None]:
    """An empty ``out``; whatever is in it when the body fails is removed again, and ``out`` too if made here."""
    with writing(out):
        made = not out.exists()
        out.mkdir(exist_ok=True)
        if any(out.iterdir()):
            raise OutputError(out, "expected a new or empty folder, found files in it")
    try:
        yield
    except BaseException:
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if made:
            out.rmdir()
        raise
