"""Chunks of one file on their way to the disk: read, and written past the page cache, side by side.

What is written once and read by somebody else gains nothing from lying in memory first: a copy through the page cache
takes fresh pages for every byte, and the sync at the end then waits for all of them at once. Here each chunk is on the
disk when its turn is over, and the sync has little left to do.
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
from exporter.tensors import ByteRange

#: Small enough that a chunk is still in the processor's cache when the disk fetches it, which is up to twice as fast as
#: 4 MB; below this the calls begin to cost.
CHUNK_BYTES: Final = 1 << 20
#: Some chunks are filled while others are on their way to the disk; measured best from 4 to 8 on two processors.
_WORKERS: Final = 6

_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Chunk:
    """A piece of the file: bytes that are in ``buffer`` already, and ``ranges`` that go there: (place in it, range)."""

    offset_bytes: int
    buffer: mmap.mmap
    nbytes: int = 0
    ranges: list[tuple[int, ByteRange]] = field(default_factory=list)

    @property
    def room(self) -> int:
        """Bytes that still fit."""
        return len(self.buffer) - self.nbytes


class InputFiles:
    """Files that are read from, each opened once."""

    def __init__(self) -> None:
        """Nothing is open yet."""
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()

    def fd(self, path: Path) -> int:
        """Raises UnreadableFile."""
        with self._lock:
            if path not in self._fds:
                with reading(path):
                    self._fds[path] = os.open(path, os.O_RDONLY)
            return self._fds[path]

    def read_into(self, source: ByteRange, view: memoryview) -> None:
        """Fill ``view`` with the range. Raises UnreadableFile if the file ends before it."""
        fd, offset = self.fd(source.path), source.offset_bytes
        while view:
            with reading(source.path):
                got = os.preadv(fd, [view], offset)
            if got == 0:
                reason = f"expected {len(view)} more bytes at {offset}, found the end of the file"
                raise UnreadableFile(source.path, reason)
            view, offset = view[got:], offset + got

    def close(self) -> None:
        """Close them all."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


class Chunks:
    """Writes chunks of the file ``fd`` in a few threads. ``chunk`` waits where too many are under way."""

    def __init__(self, path: Path, fd: int, sources: InputFiles) -> None:
        """Threads and buffers are made when they are needed."""
        self._path, self._fd, self._sources = path, fd, sources
        self._pool: ThreadPoolExecutor | None = None
        self._direct: int | None = None
        self._kernel_copy = True
        self._under_way: deque[Future[mmap.mmap]] = deque()

    def chunk(self, offset_bytes: int) -> Chunk:
        """An empty chunk. Raises what went wrong with the oldest one under way, if it is that one's turn."""
        if len(self._under_way) > _WORKERS:
            return Chunk(offset_bytes, self._under_way.popleft().result())
        return Chunk(offset_bytes, mmap.mmap(-1, CHUNK_BYTES))

    def submit(self, chunk: Chunk) -> None:
        """Fill and write ``chunk`` in a thread. It begins and ends on a block border."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_WORKERS)
            self._direct = kernel.open_direct(self._path)
        self._under_way.append(self._pool.submit(self.write, chunk, direct=True))

    def write(self, chunk: Chunk, *, direct: bool = False) -> mmap.mmap:
        """Fill and write ``chunk``; its buffer, free again. Raises UnreadableFile, OutputError."""
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
                if exc.errno != errno.EINVAL:  # blocks larger than ours, or a file system that only says so now
                    raise
        return os.pwrite(self._fd, view, offset)

    def _copied_by_kernel(self, chunk: Chunk) -> bool:
        """Without a way past the page cache, the kernel at least moves the bytes without this process."""
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
            if not moved:  # across file systems, one that lacks the call, or the end of the source: read and see
                self._kernel_copy = False
                return False
            done += moved
        return True

    def finish(self) -> None:
        """Wait for all. Raises what went wrong with the first that failed."""
        while self._under_way:
            self._under_way.popleft().result()

    def close(self) -> None:
        """Stop, whatever is under way; no thread touches the file after this."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._direct is not None:
            os.close(self._direct)
