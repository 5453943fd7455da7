"""Nothing gets its final name until it is complete and verified: a staging folder beside the target, then one rename.

The staging folder ``.NAME.partial`` is held by an advisory lock while its process lives. A leftover of a process that
was killed is not locked: the next run clears it. A second run beside a living one is refused.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from exporter.errors import OutputError, writing

_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1
_RENAME_EXCHANGE: Final = 2


@contextmanager
def staged(final: Path, *, force: bool) -> Iterator[Path]:
    """Yield a path to build ``final`` at (a file or a folder); it moves to ``final`` when the body ends well.

    A body that leaves nothing at that path but parts of it beside (a split file) has these moved beside ``final``, in
    the reverse order of their names: the first part, without which nobody reads the others, comes last.
    On an error the staging folder is removed and ``final`` is as it was. Raises OutputError if ``final`` exists and
    ``force`` is not set, or if another run is writing it.
    """
    if final.name in ("", ".."):
        raise OutputError(final, "expected a name to write, found a folder that is always there")
    _refuse_existing(final, force=force)
    folder = final.with_name(f".{final.name}.partial")
    with writing(folder):
        final.parent.mkdir(parents=True, exist_ok=True)
    lock = _claim(folder, final)
    try:
        draft = folder / final.name
        yield draft
        parts = [draft]
        if not os.path.lexists(draft):
            parts = sorted(folder.iterdir(), reverse=True) or [draft]
            for part in parts:
                _refuse_existing(final.with_name(part.name), force=force)
        with writing(final):
            for part in parts:
                _sync_tree(part)
                _promote(part, final.with_name(part.name), force=force)
            sync_folder(final.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def require_space(out: Path, nbytes: int) -> None:
    """Say so before writing for minutes: the weights alone must fit. Raises OutputError."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise OutputError(out, f"needs {nbytes} bytes, {free} are free")
    if not os.access(parent, os.W_OK):
        raise OutputError(parent, "no permission to write here")


def write_file(path: Path, content: bytes) -> None:
    """Write a small file whole, synced, its folder made if need be; its mode follows the umask. Raises OutputError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _refuse_existing(final: Path, *, force: bool) -> None:
    if os.path.lexists(final) and not force:
        raise OutputError(final, "exists already; --force replaces it")


def _claim(folder: Path, final: Path) -> int:
    """Create ``folder`` empty and lock it; the lock goes with the process."""
    while True:
        with writing(folder):
            folder.mkdir(exist_ok=True)
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # its content is about to be deleted
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(lock)
            raise OutputError(final, "another run is writing it") from exc
        # Between mkdir and flock the folder's last owner may have finished and removed it: then start over.
        if folder.is_dir() and os.stat(folder).st_ino == os.fstat(lock).st_ino:
            break
        os.close(lock)
    with writing(folder):
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    return lock


def _promote(draft: Path, final: Path, *, force: bool) -> None:
    """One rename. With ``force`` the old artifact and the new one change places, so no moment is without either."""
    try:
        if force and os.path.lexists(final):
            _renameat2(draft, final, _RENAME_EXCHANGE)
        else:
            _renameat2(draft, final, _RENAME_NOREPLACE)
    except FileExistsError as exc:
        raise OutputError(final, "another run finished first") from exc
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        # A file system without these flags: rename alone refuses a folder that exists, and replaces a file.
        if force and final.is_dir():
            final.rename(draft.with_name("replaced"))
        draft.rename(final)


def _renameat2(source: Path, target: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, "renameat2 is missing")
    paths = (ctypes.c_char_p(os.fsencode(path)) for path in (source, target))
    before, after = paths
    if libc.renameat2(_AT_FDCWD, before, _AT_FDCWD, after, ctypes.c_uint(flags)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(target))


def _sync_tree(draft: Path) -> None:
    """Folders only: files are synced by who wrote them."""
    if draft.is_dir():
        for folder, _, _ in os.walk(draft):
            sync_folder(Path(folder))


def sync_folder(folder: Path) -> None:
    """Sync the entries of ``folder``: a rename is only safe then."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
