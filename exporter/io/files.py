"""Opening input files: regular files only, never a pipe, which would block until it has a writer."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Final

from exporter.errors import UnreadableFile, reading

#: Limit for files that are read whole, such as tokenizers: the largest known has 34 MB.
MAX_WHOLE_BYTES: Final = 64 << 20
_FILE_TYPES: Final = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def opened(path: Path) -> Iterator[tuple[FileIO, int]]:
    """(file, its size in bytes). Follows links: the hub's cache consists of them.

    Raises UnreadableFile for anything but a regular file, and for an OSError of the body.
    """
    with reading(path), FileIO(path, opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            actual = _FILE_TYPES.get(stat.S_IFMT(status.st_mode), "something else")
            raise UnreadableFile(path, f"expected a regular file, found {actual}")
        yield file, status.st_size


def read_file(path: Path, *, max_nbytes: int = MAX_WHOLE_BYTES) -> bytes:
    """The content of ``path``. Raises UnreadableFile for more than ``max_nbytes``, before it reads the file."""
    with opened(path) as (file, size):
        if size > max_nbytes:
            raise UnreadableFile(path, f"expected at most {max_nbytes} bytes, found {size}")
        return read_exactly(file, size)


def read_exactly(file: FileIO, nbytes: int) -> bytes:
    """The next ``nbytes`` of ``file``, fewer only at its end."""
    content = bytearray()
    while len(content) < nbytes and (part := file.read(nbytes - len(content))):
        if len(part) == nbytes:
            return part  # the usual case, without a second copy
        content += part
    return bytes(content)


def read_at(fd: int, view: memoryview, offset_bytes: int) -> int:
    """Fill ``view`` from ``offset_bytes`` on; the number of bytes read, fewer only at the end of the file."""
    done = 0
    while done < len(view) and (nbytes := os.preadv(fd, [view[done:]], offset_bytes + done)):
        done += nbytes
    return done


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file whole and sync it; its mode follows the umask. Raises OSError."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
