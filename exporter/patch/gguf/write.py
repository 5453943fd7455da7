"""Writes a patched copy of a GGUF file, made of byte ranges of the base file, a new header, and new rows.

The module also lists the bytes that an in-place patch of a GGUF file overwrites.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from exporter.formats.gguf.raw_keys import raw_header
from exporter.formats.gguf.writer import padded
from exporter.io.output import OutputFile
from exporter.patch.gguf.plan import FilePatch, GgufPatch, TensorPatch
from exporter.patch.journal import Changes
from exporter.progress import Progress, silent
from exporter.sources.gguf.file import GgufFile
from exporter.tensors import Array, ByteRange

_Segment = ByteRange | Array | bytes


def write_patched(patch: FilePatch, path: Path, progress: Progress = silent) -> None:
    """Write the patched GGUF file to the new path ``path``.

    Peak memory: the size of the header plus the size of the new rows.

    Raises OutputError if a write fails, and UnreadableFile if the base file is truncated. After an error, ``path`` does
    not exist.
    """
    with OutputFile(path, progress, nbytes=patch.nbytes) as out:
        for segment in _segments(patch):
            if isinstance(segment, ByteRange):
                out.copy(segment)
            else:
                out.write(segment)
        if patch.header is not None:
            out.pad_to(patch.file.alignment)


def changes_in_place(patch: GgufPatch) -> Changes:
    """Return the pairs (offset, new bytes) that an in-place patch writes to each file. Requires ``patch.in_place``."""
    pieces: dict[Path, list[tuple[int, bytes]]] = {}
    for file in patch.files:
        changed = [_difference(raw_header(file.file), file.header)] if file.header is not None else []
        for tensor in file.tensors:
            offset, width = tensor.tensor.offset_bytes, tensor.tensor.row_nbytes
            for token_id, row in zip(tensor.token_ids, tensor.encoded, strict=True):
                changed.append((offset + token_id * width, row.tobytes()))
        if changed:
            pieces[file.file.path] = changed
    return Changes(pieces=pieces)


def _difference(old: bytes, new: bytes) -> tuple[int, bytes]:
    """Return (offset, new bytes) of the smallest byte range that contains all differences of two headers."""
    differs = np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))
    start, stop = int(differs[0]), int(differs[-1]) + 1
    return start, new[start:stop]


def _segments(patch: FilePatch) -> Iterator[_Segment]:
    """Yield the content of the patched file in order, as byte ranges of the base file and as new bytes."""
    file, at, end = patch.file, 0, patch.file.path.stat().st_size
    if patch.header is not None:
        yield patch.header
        at = file.data_offset
        end = max((tensor.offset_bytes + tensor.nbytes for tensor in file.tensors.values()), default=at)
    for changed in sorted(patch.tensors, key=lambda changed: changed.tensor.offset_bytes):
        tensor = changed.tensor
        for token_id, row in zip(changed.token_ids, changed.encoded, strict=True):
            if token_id >= tensor.n_rows:
                break  # token ids ascend, so all following rows are new rows
            place = tensor.offset_bytes + token_id * tensor.row_nbytes
            yield from _range(file, at, place)
            yield row
            at = place + tensor.row_nbytes
        if changed.grows:
            stop = tensor.offset_bytes + tensor.nbytes
            yield from _range(file, at, stop)
            yield from _growth(changed, file.alignment)
            at = file.data_offset + padded(stop - file.data_offset, file.alignment)
    yield from _range(file, at, end)


def _growth(changed: TensorPatch, alignment: int) -> Iterator[_Segment]:
    """Yield the rows that are appended to a tensor, and then the padding bytes before the next tensor."""
    yield changed.encoded[[token_id >= changed.tensor.n_rows for token_id in changed.token_ids]]
    nbytes = changed.n_rows * changed.tensor.row_nbytes
    yield b"\0" * (padded(nbytes, alignment) - nbytes)


def _range(file: GgufFile, start: int, stop: int) -> Iterator[_Segment]:
    if start < stop:
        yield ByteRange(file.path, start, stop - start)
