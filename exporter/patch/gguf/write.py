"""Writing a patched copy: raw ranges of the base file, new rows between them; or what a patch in place overwrites."""

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
    """Write the patched file to ``path``, which must not exist. Memory: the header and the new rows.

    Raises OutputError, UnreadableFile for a base that ends early; nothing is left at ``path`` then.
    """
    with OutputFile(path, progress, nbytes=patch.nbytes) as out:
        for segment in _segments(patch):
            if isinstance(segment, ByteRange):
                out.write_segments([segment], segment.nbytes)
            else:
                out.write(segment)
        if patch.header is not None:
            out.pad_to(patch.file.alignment)
        if out.nbytes != patch.nbytes:
            raise AssertionError(f"{path}: {patch.nbytes} bytes were promised, {out.nbytes} came")


def changes_in_place(patch: GgufPatch) -> Changes:
    """What is overwritten where no byte moves."""
    pieces: dict[Path, list[tuple[int, bytes]]] = {}
    for file in patch.files:
        found = [_difference(raw_header(file.file), file.header)] if file.header is not None else []
        for one in file.tensors:
            width = one.tensor.row_nbytes
            for token_id, row in zip(one.token_ids, one.encoded, strict=True):
                found.append((one.tensor.offset_bytes + token_id * width, row.tobytes()))
        if found:
            pieces[file.file.path] = found
    return Changes(pieces=pieces)


def _difference(old: bytes, new: bytes) -> tuple[int, bytes]:
    """(offset, bytes) from the first to the last byte that differs, of two of one length."""
    differs = np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))
    start, stop = int(differs[0]), int(differs[-1]) + 1
    return start, new[start:stop]


def _segments(patch: FilePatch) -> Iterator[_Segment]:
    """The new file front to back, in as few ranges as there can be."""
    file, at, end = patch.file, 0, patch.file.path.stat().st_size
    if patch.header is not None:
        yield patch.header
        at = file.data_offset
        end = max((one.offset_bytes + one.nbytes for one in file.tensors.values()), default=at)
    for one in sorted(patch.tensors, key=lambda one: one.tensor.offset_bytes):
        tensor = one.tensor
        for token_id, row in zip(one.token_ids, one.encoded, strict=True):
            if token_id >= tensor.n_rows:
                break  # ids ascend: the rest is new
            place = tensor.offset_bytes + token_id * tensor.row_nbytes
            yield from _range(file, at, place)
            yield row
            at = place + tensor.row_nbytes
        if one.grows:
            stop = tensor.offset_bytes + tensor.nbytes
            yield from _range(file, at, stop)
            yield from _growth(one, file.alignment)
            at = file.data_offset + padded(stop - file.data_offset, file.alignment)
    yield from _range(file, at, end)


def _growth(one: TensorPatch, alignment: int) -> Iterator[_Segment]:
    """New rows, and the padding to the tensor that follows."""
    yield one.encoded[[token_id >= one.tensor.n_rows for token_id in one.token_ids]]
    nbytes = one.n_rows * one.tensor.row_nbytes
    yield b"\0" * (padded(nbytes, alignment) - nbytes)


def _range(file: GgufFile, start: int, stop: int) -> Iterator[_Segment]:
    if start < stop:
        yield ByteRange(file.path, start, stop - start)
