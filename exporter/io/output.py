"""Writes an artifact file sequentially. The data are bytes, arrays, or byte ranges of other files.

The attribute ``nbytes`` counts the bytes written so far.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from exporter.errors import writing
from exporter.io import kernel
from exporter.io.chunks import Chunk, ChunkWriter, InputFiles
from exporter.progress import Progress, silent
from exporter.tensors import Array, ByteRange, as_bytes

#: Ranges with fewer bytes are copied, because sharing a range costs a call and two extents in the file's extent map.
_CLONE_FROM_BYTES: Final = 1 << 20


class OutputFile:
    """A new file that is written sequentially, flushed to disk (fsync) on success, and removed on failure.

    If the file system can share disk blocks between files, byte ranges of other files are shared with the new file
    instead of copied. Adjacent ranges are combined. The new file gets the default permissions (umask). Peak memory: a
    few chunks of 1 MB. Raises OutputError if the path exists already or a write fails. Raises UnreadableFile if a byte
    range to copy extends past the end of its file.
    """

    def __init__(self, path: Path, progress: Progress = silent, *, nbytes: int | None = None) -> None:
        """nbytes: the final size of the file, used to reserve disk space, or None if the size is unknown.

        The file is opened at the start of the ``with`` block.
        """
        self.path = path
        self.nbytes = 0
        self._expected_nbytes = nbytes
        self._progress = progress
        self._fd = -1
        self._sources = InputFiles()
        self._range: ByteRange | None = None  # the last range is not copied yet, because the next range may continue it
        self._chunk: Chunk | None = None
        self._shares = True
        self._beginning = b""

    def __enter__(self) -> Self:
        with writing(self.path):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._chunks = ChunkWriter(self.path, self._fd, self._sources)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        done = False
        try:
            if exc_type is None:
                self._finish()
                done = True
        finally:
            self._chunks.close()
            self._sources.close()
            os.close(self._fd)
            if not done:
                self.path.unlink(missing_ok=True)

    def write(self, data: bytes | memoryview | Array) -> None:
        """Append ``data`` to the file. The elements of an array are written in C order (row by row).

        The method copies ``data``, so the caller may modify ``data`` after the method returns.
        """
        self._flush_range()
        view = memoryview(data).cast("B") if isinstance(data, bytes | memoryview) else as_bytes(data)
        self.nbytes += len(view)
        while view:
            chunk = self._open_chunk(self.nbytes - len(view))
            head = view[: chunk.free_nbytes]
            chunk.buffer[chunk.nbytes : chunk.nbytes + len(head)] = head
            self._grow(chunk, len(head))
            view = view[len(head) :]

    def begin_with(self, data: bytes) -> None:
        """At the end of the ``with`` block, overwrite the first bytes of the file with ``data``.

        Some values at the start of the file, such as a digest, are known only after the rest of the file is written.
        """
        self._beginning = data

    def pad_to(self, alignment: int) -> None:
        """Append zeros until the file size is a multiple of ``alignment`` bytes."""
        self.write(b"\0" * (-self.nbytes % alignment))

    def write_segments(self, segments: Iterable[ByteRange | Array], nbytes: int) -> None:
        """Append the bytes of a tensor, given as byte ranges of files and as arrays.

        Raises AssertionError if the number of appended bytes differs from ``nbytes``, the planned size of the tensor.
        """
        before = self.nbytes
        for segment in segments:
            if isinstance(segment, ByteRange):
                self.copy(segment)
            else:
                self.write(segment)
        if self.nbytes - before != nbytes:
            raise AssertionError(f"{self.path}: expected {nbytes} bytes, wrote {self.nbytes - before}")

    def copy(self, source: ByteRange) -> None:
        """Append a byte range of a different file to this file."""
        last = self._range
        if last and (last.path, last.offset_bytes + last.nbytes) == (source.path, source.offset_bytes):
            self._range = replace(last, nbytes=last.nbytes + source.nbytes)
        else:
            self._flush_range()
            self._range = source
        self.nbytes += source.nbytes

    def _flush_range(self) -> None:
        source, self._range = self._range, None
        if source is None:
            return
        start = self.nbytes - source.nbytes
        head = -start % kernel.ALIGNMENT
        middle = (source.nbytes - head) // kernel.ALIGNMENT * kernel.ALIGNMENT
        if middle >= _CLONE_FROM_BYTES and not (source.offset_bytes + head) % kernel.ALIGNMENT and self._shares:
            self._append(start, _subrange(source, 0, head))
            self._submit()
            self._shares = kernel.clone(
                self._fd, start + head, self._sources.fd(source.path), source.offset_bytes + head, middle
            )
            if self._shares:
                self._progress(middle)
                head += middle
            self._append(start + head, _subrange(source, head, source.nbytes))
        else:
            self._append(start, source)

    def _append(self, offset_bytes: int, source: ByteRange) -> None:
        at = 0
        while at < source.nbytes:
            chunk = self._open_chunk(offset_bytes + at)
            piece = _subrange(source, at, min(at + chunk.free_nbytes, source.nbytes))
            chunk.ranges.append((chunk.nbytes, piece))
            self._grow(chunk, piece.nbytes)
            at += piece.nbytes

    def _open_chunk(self, offset_bytes: int) -> Chunk:
        if self._chunk is None:
            self._chunk = self._chunks.chunk(offset_bytes)
        return self._chunk

    def _grow(self, chunk: Chunk, nbytes: int) -> None:
        chunk.nbytes += nbytes
        if not chunk.free_nbytes:
            if chunk.offset_bytes == 0 and self._expected_nbytes:
                with writing(self.path):
                    kernel.reserve(self._fd, 0, self._expected_nbytes)
            self._submit()
        self._progress(nbytes)

    def _submit(self) -> None:
        if self._chunk is not None:
            self._chunks.submit(self._chunk)
            self._chunk = None

    def _finish(self) -> None:
        self._flush_range()
        if self._chunk is not None:
            self._chunks.write(self._chunk)
        self._chunks.finish()
        rest = memoryview(self._beginning)
        with writing(self.path):
            while rest:
                rest = rest[os.pwrite(self._fd, rest, len(self._beginning) - len(rest)) :]
        if self._expected_nbytes not in (None, self.nbytes):
            raise AssertionError(f"{self.path}: expected {self._expected_nbytes} bytes, wrote {self.nbytes}")
        with writing(self.path):
            os.fsync(self._fd)


def _subrange(source: ByteRange, start: int, stop: int) -> ByteRange:
    return ByteRange(source.path, source.offset_bytes + start, stop - start)
