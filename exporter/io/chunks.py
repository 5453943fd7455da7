"""Writes one file in chunks: several threads read their sources and write them past the page cache.

The page cache does not help a file that is written once and read by another process: it takes a new page for every
byte, and the final sync waits for all of them at once. Here every chunk is on the disk when its write returns, and the
sync has little left to do.
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

#: Small enough that a chunk is still in the processor's cache when the disk fetches it, which is up to twice as fast as
#: with 4 MB; with smaller chunks the cost of the calls shows.
CHUNK_BYTES: Final = 1 << 20
#: Some threads fill chunks while others wait for the disk; 4 to 8 were the fastest on two processors.
_WORKERS: Final = 6

_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Chunk:
    """A piece of the file. ranges: (offset in ``buffer``, range of another file to read there); the rest is filled."""

    offset_bytes: int
    buffer: mmap.mmap
    nbytes: int = 0
    ranges: list[tuple[int, ByteRange]] = field(default_factory=list)

    @property
    def free_nbytes(self) -> int:
        """Bytes that still fit."""
        return len(self.buffer) - self.nbytes


class InputFiles:
    """The files that ranges are read from, each opened once."""

    def __init__(self) -> None:
        """Opens no file."""
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()

    def fd(self, path: Path) -> int:
        """The descriptor of ``path``, opened on first use. Raises UnreadableFile."""
        with self._lock:
            if path not in self._fds:
                with reading(path):
                    self._fds[path] = os.open(path, os.O_RDONLY)
            return self._fds[path]

    def read_into(self, source: ByteRange, view: memoryview) -> None:
        """Fill ``view`` with the range. Raises UnreadableFile if the file ends before the range does."""
        fd = self.fd(source.path)
        with reading(source.path):
            done = read_at(fd, view, source.offset_bytes)
        if done < len(view):
            reason = (
                f"expected {len(view) - done} more bytes at {source.offset_bytes + done}, found the end of the file"
            )
            raise UnreadableFile(source.path, reason)

    def close(self) -> None:
        """Close all files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


class ChunkWriter:
    """Writes chunks of the file ``fd`` in a few threads; ``chunk`` blocks while too many are pending."""

    def __init__(self, path: Path, fd: int, sources: InputFiles) -> None:
        """Threads and buffers are created on first use."""
        self._path, self._fd, self._sources = path, fd, sources
        self._pool: ThreadPoolExecutor | None = None
        self._direct: int | None = None
        self._kernel_copy = True
        self._pending: deque[Future[mmap.mmap]] = deque()

    def chunk(self, offset_bytes: int) -> Chunk:
        """An empty chunk. Raises the error of the oldest pending chunk, if it waits for that."""
        if len(self._pending) > _WORKERS:
            return Chunk(offset_bytes, self._pending.popleft().result())
        return Chunk(offset_bytes, mmap.mmap(-1, CHUNK_BYTES))

    def submit(self, chunk: Chunk) -> None:
        """Fill and write ``chunk`` in a thread. It begins and ends on a block boundary."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_WORKERS)
            self._direct = kernel.open_direct(self._path)
        self._pending.append(self._pool.submit(self.write, chunk, direct=True))

    def write(self, chunk: Chunk, *, direct: bool = False) -> mmap.mmap:
        """Fill and write ``chunk``; returns its buffer for reuse. Raises UnreadableFile, OutputError."""
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
                if exc.errno != errno.EINVAL:  # larger blocks, or a file system that only refuses here
                    raise
        return os.pwrite(self._fd, view, offset)

    def _copied_by_kernel(self, chunk: Chunk) -> bool:
        """Copy within the kernel where direct writes are not possible; False where this is not possible either."""
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
            if not moved:  # two file systems, one without the call, or the end of the source: reading finds out
                self._kernel_copy = False
                return False
            done += moved
        return True

    def finish(self) -> None:
        """Wait for all pending chunks. Raises the error of the first that failed."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Cancel pending chunks; no thread touches the file after this."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._direct is not None:
            os.close(self._direct)
