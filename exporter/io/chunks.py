"""Writes a file in chunks, with several threads that read the input data and write the output with direct I/O.

Direct I/O bypasses the page cache. The page cache would not speed up writing a file once, because the kernel would
allocate new pages for all bytes and the final sync would wait until all pages are on the disk. With direct I/O, every
chunk is on the disk when the write call returns, so the final sync is short.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from exporter.errors import OutputError, UnreadableFile, reading, writing
from exporter.io import kernel
from exporter.io.files import read_at
from exporter.tensors import ByteRange

#: Size of a chunk. A chunk of 1 MB is still in the processor's cache when the disk fetches the chunk, which is up to
#: twice as fast as with chunks of 4 MB. With smaller chunks, the cost of the system calls becomes measurable.
CHUNK_BYTES: Final = 1 << 20
#: Number of threads. Some threads fill chunks while other threads wait for the disk. On two processors, 4 to 8 threads
#: were the fastest.
_WORKERS: Final = 6

_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Chunk:
    """A block of consecutive bytes of the output file, with the bytes in ``buffer``.

    ranges: pairs (offset in ``buffer``, byte range of an input file to read into ``buffer`` at that offset). All other
    bytes of ``buffer`` already have their final values.
    """

    offset_bytes: int
    buffer: mmap.mmap
    nbytes: int = 0
    ranges: list[tuple[int, ByteRange]] = field(default_factory=list)

    @property
    def free_nbytes(self) -> int:
        """Number of free bytes in the buffer of the chunk."""
        return len(self.buffer) - self.nbytes


class InputFiles:
    """The open input files from which chunks are read. Each input file is opened only once."""

    def __init__(self) -> None:
        """Create an empty collection of input files; no file is opened yet."""
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()

    def fd(self, path: Path) -> int:
        """Return the file descriptor of ``path``.

        The file is opened on the first call with ``path``. Raises UnreadableFile if the file cannot be opened.
        """
        with self._lock:
            if path not in self._fds:
                with reading(path):
                    self._fds[path] = os.open(path, os.O_RDONLY)
            return self._fds[path]

    def read_into(self, source: ByteRange, view: memoryview) -> None:
        """Read the byte range ``source`` of an input file into ``view``.

        Raises UnreadableFile if the file ends before the end of the range.
        """
        fd = self.fd(source.path)
        with reading(source.path):
            done = read_at(fd, view, source.offset_bytes)
        if done < len(view):
            at = source.offset_bytes + done
            reason = f"expected {len(view) - done} more bytes at offset {at}, found the end of the file"
            raise UnreadableFile(source.path, reason)

    def close(self) -> None:
        """Close all files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


class ChunkWriter:
    """Writes chunks to the file descriptor ``fd`` in several threads.

    The method ``chunk`` blocks while too many submitted chunks are not yet written.
    """

    def __init__(self, path: Path, fd: int, sources: InputFiles) -> None:
        """Create the writer for the open file ``fd``; threads and buffers are created later, when needed."""
        self._path, self._fd, self._sources = path, fd, sources
        self._pool: ThreadPoolExecutor | None = None
        self._direct: int | None = None
        self._kernel_copy = True
        self._pending: deque[Future[mmap.mmap]] = deque()

    def chunk(self, offset_bytes: int) -> Chunk:
        """Return an empty chunk for the file offset ``offset_bytes``.

        If too many chunks are pending, the method waits until the oldest chunk is written, and raises an error if that
        chunk could not be written.
        """
        if len(self._pending) > _WORKERS:
            return Chunk(offset_bytes, self._pending.popleft().result())
        return Chunk(offset_bytes, mmap.mmap(-1, CHUNK_BYTES))

    def submit(self, chunk: Chunk) -> None:
        """Submit ``chunk`` to a worker thread, which reads the input ranges and writes the chunk to the output file.

        The chunk must begin and end at multiples of the disk's block size.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_WORKERS)
            self._direct = kernel.open_direct(self._path)
        self._pending.append(self._pool.submit(self.write, chunk, direct=True))

    def write(self, chunk: Chunk, *, direct: bool = False) -> mmap.mmap:
        """Read the input ranges of ``chunk``, write ``chunk`` to the output file, and return the buffer for reuse.

        Raises UnreadableFile if an input cannot be read, and OutputError if the write fails.
        """
        if self._direct is None and self._copied_by_kernel(chunk):
            return chunk.buffer
        view = memoryview(chunk.buffer)
        for place, source in chunk.ranges:
            self._sources.read_into(source, view[place : place + source.nbytes])
        rest, offset = view[: chunk.nbytes], chunk.offset_bytes
        with writing(self._path):
            while rest:
                done = self._write_some(rest, offset, direct=direct)
                rest, offset = rest[done:], offset + done
        return chunk.buffer

    def _write_some(self, view: memoryview, offset: int, *, direct: bool) -> int:
        if direct and self._direct is not None and not (len(view) | offset) % kernel.ALIGNMENT:
            try:
                return os.pwrite(self._direct, view, offset)
            except OSError as exc:
                if (
                    exc.errno != errno.EINVAL
                ):  # EINVAL: larger blocks, or a file system that refuses direct writes only at this call
                    raise
        return os.pwrite(self._fd, view, offset)

    def _copied_by_kernel(self, chunk: Chunk) -> bool:
        """Copy the chunk from the input file to the output file with the system call copy_file_range.

        Returns False if the chunk is not a single input range, or if the kernel cannot copy between the two files. The
        system call copy_file_range is used only if the output file system does not support direct I/O.
        """
        if not self._kernel_copy or len(chunk.ranges) != 1 or chunk.ranges[0][1].nbytes != chunk.nbytes:
            return False
        source, done = chunk.ranges[0][1], 0
        fd = self._sources.fd(source.path)
        while done < chunk.nbytes:
            try:
                moved = os.copy_file_range(
                    fd, self._fd, chunk.nbytes - done, source.offset_bytes + done, chunk.offset_bytes + done
                )
            except OSError as exc:
                if exc.errno in _NO_SPACE:
                    raise OutputError(self._path, "no space left on the device") from exc
                moved = 0
            if (
                not moved
            ):  # two file systems, a file system without the call, or the end of the source: a read finds the cause
                self._kernel_copy = False
                return False
            done += moved
        return True

    def finish(self) -> None:
        """Wait until all pending chunks are written.

        If chunks could not be written, the error of the first failed chunk is raised.
        """
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Cancel all pending chunks and stop the worker threads.

        No thread uses the output file after the method ``close`` returns.
        """
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._direct is not None:
            os.close(self._direct)
