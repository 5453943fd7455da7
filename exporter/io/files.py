"""Opens input files.

Only regular files are opened, because opening a pipe would block until another process writes to the pipe.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Final

from exporter.errors import UnreadableFile, reading

#: Limit for files that are read whole, such as tokenizers. The largest known tokenizer file has 34 MB.
MAX_WHOLE_BYTES: Final = 64 << 20
_FILE_TYPES: Final = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def opened(path: Path) -> Iterator[tuple[FileIO, int]]:
    """Open ``path`` and yield (file, size in bytes).

    Symlinks are followed, because model files in the Hugging Face cache are symlinks. Raises UnreadableFile if ``path``
    is not a regular file, or if the body of the ``with`` block raises OSError.
    """
    with reading(path), FileIO(path, opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            actual = _FILE_TYPES.get(stat.S_IFMT(status.st_mode), "a special file")
            raise UnreadableFile(path, f"expected a regular file, found {actual}")
        yield file, status.st_size


def read_file(path: Path, *, max_nbytes: int = MAX_WHOLE_BYTES) -> bytes:
    """Return the content of the file ``path``.

    Raises UnreadableFile, without reading the file, if the file has more than ``max_nbytes`` bytes.
    """
    with opened(path) as (file, size):
        if size > max_nbytes:
            raise UnreadableFile(path, f"expected a file of at most {max_nbytes} bytes, found {size} bytes")
        return read_exactly(file, size)


def read_exactly(file: FileIO, nbytes: int) -> bytes:
    """Read the next ``nbytes`` bytes of ``file``, or all remaining bytes if fewer than ``nbytes`` remain."""
    content = bytearray()
    while len(content) < nbytes and (part := file.read(nbytes - len(content))):
        if len(part) == nbytes:
            return part  # the usual case needs no second copy
        content += part
    return bytes(content)


def read_at(fd: int, view: memoryview, offset_bytes: int) -> int:
    """Read bytes from the open file ``fd`` into ``view``, beginning at the file offset ``offset_bytes``.

    Returns the number of bytes read, which is smaller than the size of ``view`` only at the end of the file.
    """
    done = 0
    while done < len(view) and (nbytes := os.preadv(fd, [view[done:]], offset_bytes + done)):
        done += nbytes
    return done


def version_of(path: Path) -> tuple[int, ...]:
    """Return numbers that change if the file is replaced or rewritten, for the keys of caches of file contents."""
    with reading(path):
        status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def write_synced(path: Path, content: bytes) -> None:
    """Write ``content`` to a new file and flush the file to disk (fsync).

    The file gets the default permissions (umask). Raises OSError if the write fails or the file exists.
    """
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
