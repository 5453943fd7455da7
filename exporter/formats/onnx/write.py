"""Writing the planned folder: for each variant its data file, front to back, and its graph; then what clients read."""

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
from exporter.formats.onnx.plan import Item, OnnxLayout, Variant
from exporter.io.output import OutputFile
from exporter.io.staging import write_file
from exporter.merge.model import MergedModel
from exporter.progress import Progress, silent
from exporter.tensors import ByteRange, blocks, cast
from exporter.version import __version__

FOLDER: Final = "onnx"
MODEL: Final = "model.onnx"
MODEL_SUFFIX: Final = ".onnx"
#: transformers.js looks for the weights of ``model.onnx`` under this one name, beside it.
DATA: Final = "model.onnx_data"
DATA_SUFFIX: Final = ".onnx_data"

_TYPES: Final = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "U8": ir.DataType.UINT8}


def write_onnx(layout: OnnxLayout, out: Path, progress: Progress = silent) -> None:
    """Write ``layout`` into the folder ``out``, which is made, or is there and empty; same layout, same bytes.

    Memory: the largest linear (not the embedding, which goes in row blocks) and a few megabytes.
    Raises OutputError if ``out`` holds something or the device refuses, BadInput for a checkpoint that changed or
    values that a precision cannot hold; nothing is left in ``out`` then.
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
    """A model file: the graph, its weights by reference to the file ``data``, and where it came from."""
    weights = {item.value.name: initialiser(_external(item, data)) for item in variant.items}
    floats = _TYPES[variant.precision.floats]
    graph = build(layout.spec, weights, tied=layout.model.tie.tied, floats=floats, ops=layout.ops)
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="ttexport", producer_version=__version__)
    model.metadata_props.update({f"ttexport.{key}": value for key, value in sorted(layout.model.provenance.items())})
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def _external(item: Item, data: str) -> ir.ExternalTensor:
    value = item.value
    return ir.ExternalTensor(
        data, item.offset_bytes, item.nbytes, _TYPES[value.dtype], shape=ir.Shape(value.shape), name=value.name
    )


def _write_variant(layout: OnnxLayout, variant: Variant, folder: Path, progress: Progress) -> None:
    """Every name of the variant has its own model file and its own data file.

    No hard links between them: onnx.load takes data with several links for an attack, and refuses it.
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
    for item in variant.items:
        file.write(bytes(item.offset_bytes - file.nbytes))
        _write_item(layout.model, item, file)
        for name in item.sources:
            ledger.take(name, item.value.rule)
    for name, rule in layout.dropped.items():
        ledger.take(name, rule)
    ledger.close()


def _write_item(model: MergedModel, item: Item, file: OutputFile) -> None:
    try:
        file.write_segments(item.value.segments(), item.nbytes)
    except BadInput as exc:
        name = _culprit(model, item) if exc.path is None else None
        if name is None:
            raise
        with in_tensor(model.where(name), name):
            raise


def _culprit(model: MergedModel, item: Item) -> str | None:
    """Of several sources the first with a value that does not fit, of one that one; None for an item without any."""
    if len(item.sources) > 1:
        dtype = "F16" if item.value.dtype == "F16" else "F32"
        for name in item.sources:
            if not all(np.isfinite(cast(block, dtype)).all() for _, block in blocks(model.tensor(name))):
                return name
    return next(iter(item.sources), None)


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
