"""Writing one artifact file: bytes in order, tensors by range or block, every byte accounted for."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np

from exporter.errors import OutputError, UnreadableFile, reading, writing
from exporter.tensors import Array, ByteRange

#: Called with the number of bytes just written.
Progress = Callable[[int], None]

#: One copy_file_range call: the kernel moves it without passing through this process, and progress stays lively.
_COPY_BYTES: Final = 64 << 20
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def silent(nbytes: int) -> None:
    """A ``Progress`` for callers that show none."""


class OutputFile:
    """A new file that is written front to back, synced on success and removed on failure.

    The mode follows the umask. Raises OutputError if the path exists already, or when the device refuses a write.
    """

    def __init__(self, path: Path, progress: Progress = silent) -> None:
        """Nothing is opened before the ``with`` block is entered."""
        self.path = path
        self.nbytes = 0
        self._progress = progress
        self._fd = -1
        self._kernel_copy = True

    def __enter__(self) -> Self:
        with writing(self.path):
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with writing(self.path):
                    os.fsync(self._fd)
        finally:
            os.close(self._fd)
            if kind is not None:
                self.path.unlink(missing_ok=True)

    def write(self, data: bytes | memoryview | Array) -> None:
        """Append ``data``; an array is written as its C-order bytes."""
        view = memoryview(data).cast("B") if isinstance(data, bytes | memoryview) else _as_bytes(data)
        with writing(self.path):
            while view:
                done = os.write(self._fd, view)
                self._advance(done)
                view = view[done:]

    def pad_to(self, alignment: int) -> None:
        """Append zeros up to the next multiple of ``alignment`` bytes."""
        self.write(b"\0" * (-self.nbytes % alignment))

    def write_segments(self, segments: Iterable[ByteRange | Array], nbytes: int) -> None:
        """Append a tensor. Raises AssertionError if it does not come to ``nbytes``: a layout was promised before."""
        before = self.nbytes
        for segment in segments:
            if isinstance(segment, ByteRange):
                self._copy(segment)
            else:
                self.write(segment)
        if self.nbytes - before != nbytes:
            raise AssertionError(f"{self.path}: {nbytes} bytes were promised, {self.nbytes - before} came")

    def _copy(self, source: ByteRange) -> None:
        with reading(source.path):
            fd = os.open(source.path, os.O_RDONLY)
        try:
            offset, left = source.offset_bytes, source.nbytes
            while left:
                done = self._copy_some(fd, source.path, offset, min(left, _COPY_BYTES))
                offset, left = offset + done, left - done
                self._advance(done)
        finally:
            os.close(fd)

    def _copy_some(self, fd: int, source: Path, offset: int, nbytes: int) -> int:
        if self._kernel_copy:
            try:
                if done := os.copy_file_range(fd, self._fd, nbytes, offset):
                    return done
            except OSError as exc:
                if exc.errno in _NO_SPACE:
                    raise OutputError(self.path, "no space left on the device") from exc
            # Across file systems, or on one that lacks the call: read and write instead, for the rest of this file.
            self._kernel_copy = False
        with reading(source):
            data = os.pread(fd, min(nbytes, 8 << 20), offset)
        if not data:
            raise UnreadableFile(source, f"expected {nbytes} more bytes at {offset}, found the end of the file")
        with writing(self.path):
            return os.write(self._fd, data)

    def _advance(self, nbytes: int) -> None:
        self.nbytes += nbytes
        self._progress(nbytes)


def _as_bytes(value: Array) -> memoryview:
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
