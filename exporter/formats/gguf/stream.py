"""Writing the planned file front to back: raw ranges where the bytes exist already, row blocks for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from exporter.errors import BadInput
from exporter.formats.gguf.plan import GgufLayout, Item
from exporter.formats.gguf.quantise import encode
from exporter.formats.gguf.writer import ALIGNMENT
from exporter.formats.output import OutputFile, Progress, silent
from exporter.merge.model import MergedModel
from exporter.tensors import Array, LazyTensor

#: Rows are converted in blocks of about this many stored bytes. Q8_0 makes several float32 arrays on the way, and
#: those that fit the processor's cache are twice as fast as large ones.
_CONVERT_BYTES: Final = 1 << 20


def write_gguf(layout: GgufLayout, path: Path, progress: Progress = silent) -> None:
    """Write ``layout`` to ``path``, a new file; the same layout gives the same bytes.

    Memory: a few megabytes beside the header. Raises OutputError if the path exists or the device refuses, BadInput
    for values that the type cannot hold or a checkpoint that changed; nothing is left at ``path`` then.
    """
    ledger = layout.model.ledger()
    with OutputFile(path, progress) as out:
        out.write(layout.header)
        for item in layout.items:
            if item.source is None:
                assert item.value is not None
                out.write(item.value)
            else:
                _write_stored(layout.model, item, item.source, out)
                ledger.take(item.source, item.rule)
            out.pad_to(ALIGNMENT)
        for name, rule in layout.dropped.items():
            ledger.take(name, rule)
        ledger.close()
        if out.nbytes != layout.nbytes:
            raise AssertionError(f"{path}: {layout.nbytes} bytes were promised, {out.nbytes} came")


def _write_stored(model: MergedModel, item: Item, name: str, out: OutputFile) -> None:
    tensor = model.tensor(name)
    if tensor.spec.dtype == item.entry.type and not item.heads:
        out.write_segments(tensor.segments(), item.entry.nbytes)
        return
    try:
        out.write_segments(_blocks(tensor, item), item.entry.nbytes)
    except BadInput as exc:
        where = model.where(name)
        if str(exc).startswith(str(where)):
            raise
        raise BadInput(f"{where}: {name}: {exc}") from exc


def _blocks(tensor: LazyTensor, item: Item) -> Iterator[Array]:
    """The tensor in the type of the file, block by block; whole heads at a time where they are reordered."""
    spec = tensor.spec
    if len(spec.shape) < 2 and not item.heads:
        yield encode(tensor.rows(0, spec.n_rows), item.entry.type)
        return
    unit = spec.n_rows // item.heads if item.heads else 1
    step = unit * max(1, _CONVERT_BYTES // max(1, unit * spec.row_nbytes))
    for start in range(0, spec.n_rows, step):
        rows = tensor.rows(start, min(start + step, spec.n_rows))
        yield encode(_interleave(rows, unit) if item.heads else rows, item.entry.type)


def _interleave(rows: Array, head_dim: int) -> Array:
    """Whole heads (n * head_dim, ...) with row i and row i + head_dim/2 of each head brought side by side.

    Source: llama.cpp rotates neighbouring pairs, transformers the two halves of a head.
    """
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
