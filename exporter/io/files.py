"""Opening a file that somebody else made: a regular one, never a pipe that would wait for its writer."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Final

from exporter.errors import UnreadableFile, reading

#: What is read whole, such as a tokenizer: the largest of the field has 34 MB.
MAX_WHOLE_BYTES: Final = 64 << 20
_KINDS: Final = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def opened(path: Path) -> Iterator[tuple[FileIO, int]]:
    """(file, its size in bytes). Links are followed: the cache of the hub is made of them.

    Raises UnreadableFile for what is no regular file, and for an OSError of the body.
    """
    with reading(path), FileIO(path, opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            raise UnreadableFile(path, f"expected a regular file, found {kind}")
        yield file, status.st_size


def read_file(path: Path, *, max_nbytes: int = MAX_WHOLE_BYTES) -> bytes:
    """The content of ``path``. Raises UnreadableFile, before it is read, for more than ``max_nbytes``."""
    with opened(path) as (file, size):
        if size > max_nbytes:
            raise UnreadableFile(path, f"expected at most {max_nbytes} bytes, found {size}")
        return read_exactly(file, size)


def read_exactly(file: FileIO, nbytes: int) -> bytes:
    """The next ``nbytes`` of ``file``, fewer only where it ends."""
    content = bytearray()
    while len(content) < nbytes and (part := file.read(nbytes - len(content))):
        if len(part) == nbytes:
            return part  # the rule, and no second copy
        content += part
    return bytes(content)


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
