"""What Linux does with files that Python has no call for: room reserved ahead, ranges shared instead of copied."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

#: Both ends of a shared range lie on block borders, in memory and on disk. Source: ioctl_ficlonerange(2), open(2).
ALIGNMENT: Final = 4096
#: _IOW(0x94, 13, struct file_clone_range). Source: linux/fs.h.
_FICLONERANGE: Final = 0x4020940D
_CLONE_RANGE: Final = struct.Struct("=qQQQ")

_NOT_HERE: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY, errno.EXDEV, errno.EPERM, errno.EBADF)


def reserve(fd: int, offset_bytes: int, nbytes: int) -> None:
    """Set room aside for bytes that will be written, so that a full disk shows before the work is done.

    Nothing happens on a file system that cannot. Raises OSError where there is no room. Unlike posix_fallocate, this
    never writes the range in order to reserve it.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if call is None or nbytes <= 0:
        return
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if call(fd, 0, offset_bytes, nbytes) and (code := ctypes.get_errno()) not in _NOT_HERE:
        raise OSError(code, os.strerror(code))


def clone(fd: int, offset_bytes: int, source_fd: int, source_offset_bytes: int, nbytes: int) -> bool:
    """Let ``fd`` share a range of another file; False where that cannot be. All three numbers are aligned."""
    try:
        fcntl.ioctl(fd, _FICLONERANGE, _CLONE_RANGE.pack(source_fd, source_offset_bytes, nbytes, offset_bytes))
    except OSError as exc:
        if exc.errno in _NOT_HERE:
            return False
        raise
    return True


def open_direct(path: Path) -> int | None:
    """``path`` opened for writing past the page cache; None where the file system has no such way."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError as exc:
        if exc.errno in _NOT_HERE:
            return None
        raise
