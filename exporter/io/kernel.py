"""Calls Linux file operations: reserving disk space, sharing byte ranges between files, and direct I/O."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

#: Both ends of a shared range, and of a direct write in memory and on disk, must be multiples of this number of bytes.
#: Sources: ioctl_ficlonerange(2), open(2).
ALIGNMENT: Final = 4096
#: _IOW(0x94, 13, struct file_clone_range). Source: linux/fs.h.
_FICLONERANGE: Final = 0x4020940D
_CLONE_RANGE: Final = struct.Struct("=qQQQ")

#: Error numbers of a file system, or of a pair of files, that does not support the operation.
_UNSUPPORTED: Final = (
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EINVAL,
    errno.ENOTTY,
    errno.EXDEV,
    errno.EPERM,
    errno.EBADF,
)


def reserve(fd: int, offset_bytes: int, nbytes: int) -> None:
    """Reserve disk space for a file, so that a full disk is detected before the file is written.

    Does nothing if the file system cannot reserve space. Raises OSError if the disk does not have enough free space.
    The function does not call posix_fallocate, which writes to every block of the file if the file system cannot
    reserve space.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if call is None or nbytes <= 0:
        return
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if call(fd, 0, offset_bytes, nbytes) and (code := ctypes.get_errno()) not in _UNSUPPORTED:
        raise OSError(code, os.strerror(code))


def clone(fd: int, offset_bytes: int, source_fd: int, source_offset_bytes: int, nbytes: int) -> bool:
    """Make a byte range of the file ``fd`` share disk blocks with the file ``source_fd``, without copying bytes.

    Returns False if the file system cannot share byte ranges between files. The two offsets and ``nbytes`` must be
    multiples of ``ALIGNMENT``.
    """
    try:
        fcntl.ioctl(fd, _FICLONERANGE, _CLONE_RANGE.pack(source_fd, source_offset_bytes, nbytes, offset_bytes))
    except OSError as exc:
        if exc.errno in _UNSUPPORTED:
            return False
        raise
    return True


def open_direct(path: Path) -> int | None:
    """Open ``path`` for writing with direct I/O, which bypasses the page cache.

    Returns None if the file system does not support direct I/O.
    """
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError as exc:
        if exc.errno in _UNSUPPORTED:
            return None
        raise
