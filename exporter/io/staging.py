"""Output gets its final name only when it is complete and verified: a staging folder beside it, then one rename.

An advisory lock protects the staging folder ``.NAME.partial`` while its process lives. The folder of a killed process
is not locked: the next run clears it or resumes from it. A second concurrent run is refused.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.errors import OutputError, writing
from exporter.io.files import write_synced

_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1
_RENAME_EXCHANGE: Final = 2
#: File of a resumable staging folder: device and inode of the folder that is about to get its final name.
_PROMOTING: Final = "promoting"


@contextmanager
def staged(final: Path, *, force: bool) -> Iterator[Path]:
    """Yield a path to build ``final`` at (a file or a folder); it moves to ``final`` when the body succeeds.

    If the body leaves nothing at that path but several files beside it (a split file), these move beside ``final`` in
    the reverse order of their names: the first file comes last, because readers open the others through it.
    On an error the staging folder is removed and ``final`` is unchanged. Raises OutputError if ``final`` exists and
    ``force`` is not set, or if another run is writing it.
    """
    if final.name in ("", ".."):
        raise OutputError(final, "expected a name to write, found a folder that is always there")
    _refuse_existing(final, force=force)
    folder = staging_folder(final)
    with writing(folder):
        final.parent.mkdir(parents=True, exist_ok=True)
    lock = _claim(folder, final)
    try:
        _clear(folder)
        draft = folder / final.name
        yield draft
        drafts = [draft]
        if not os.path.lexists(draft):
            drafts = sorted(folder.iterdir(), reverse=True) or [draft]
            for file in drafts:
                _refuse_existing(final.with_name(file.name), force=force)
        with writing(final):
            for entry in drafts:
                _sync_tree(entry)
                _promote(entry, final.with_name(entry.name), force=force)
            sync_folder(final.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@dataclass
class Stage:
    """A staging folder that outlives its process. draft: the existing folder that will become ``final``.

    keep: whether the folder stays after an error, for another run to resume. promoted: the previous run renamed its
    draft to ``final``, and only this staging folder is left to remove.
    """

    folder: Path
    draft: Path
    keep: bool = False
    promoted: bool = False


def staging_folder(final: Path) -> Path:
    """The staging folder of ``final``; it exists while a run writes, and after an interrupted run."""
    return final.with_name(f".{final.name}.partial")


@contextmanager
def resumable(final: Path, *, force: bool, resume: bool) -> Iterator[Stage]:
    """As ``staged`` for a folder, but an error keeps the draft for a run with ``resume``; ``force`` alone starts over.

    Raises OutputError if ``final`` exists and ``force`` is not set, if another run is writing it, or for a leftover
    staging folder without ``resume`` or ``force``.
    """
    if final.name in ("", ".."):
        raise OutputError(final, "expected a name to write, found a folder that is always there")
    folder = staging_folder(final)
    if not resume:
        _refuse_existing(final, force=force)
    with writing(folder):
        final.parent.mkdir(parents=True, exist_ok=True)
    lock = _claim(folder, final)
    stage = Stage(folder, folder / final.name, keep=True)
    try:
        stage.promoted = resume and _is_promoted(folder, final)
        if not stage.promoted:
            _refuse_existing(final, force=force)
            if any(folder.iterdir()) and not (resume or force):
                raise OutputError(folder, "left by an interrupted run; --resume continues it, --force starts over")
            if not resume:
                _clear(folder)
            stage.keep = any(folder.iterdir())
            with writing(stage.draft):
                (folder / _PROMOTING).unlink(missing_ok=True)
                stage.draft.mkdir(exist_ok=True)
        yield stage
        if not stage.promoted:
            _promote_folder(stage, final, force=force)
        stage.keep = False
    finally:
        try:
            if not stage.keep:
                _discard(folder)
        finally:
            os.close(lock)


def has_leftover(final: Path) -> bool:
    """Whether an interrupted run left a draft to resume, or is still writing.

    Removes an empty staging folder: a run may be killed during its clean-up.
    """
    folder = staging_folder(final)
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.rmdir()
    except OSError:  # locked, or not empty
        return True
    finally:
        os.close(lock)
    return False


def _discard(folder: Path) -> None:
    with suppress(OutputError):
        _clear(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _promote_folder(stage: Stage, final: Path, *, force: bool) -> None:
    """Rename the draft, after recording its inode, by which a later run detects that the rename happened."""
    status = stage.draft.stat()
    write_file(stage.folder / _PROMOTING, f"{status.st_dev} {status.st_ino}".encode())
    with writing(final):
        sync_folder(stage.folder)
        _sync_tree(stage.draft)
        _promote(stage.draft, final, force=force)
        sync_folder(final.parent)


def _is_promoted(folder: Path, final: Path) -> bool:
    try:
        recorded, status = (folder / _PROMOTING).read_text().split(), final.stat()
    except OSError:
        return False
    return recorded == [str(status.st_dev), str(status.st_ino)]


def require_space(out: Path, nbytes: int) -> None:
    """Check before a long write that ``nbytes`` are free at ``out`` and its folder is writable. Raises OutputError."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise OutputError(out, f"needs {nbytes} bytes, {free} are free")
    if not os.access(parent, os.W_OK):
        raise OutputError(parent, "no permission to write here")


def write_file(path: Path, content: bytes) -> None:
    """Write and sync a small new file, creating its folder; the mode follows the umask. Raises OutputError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(path, content)


def _refuse_existing(final: Path, *, force: bool) -> None:
    if os.path.lexists(final) and not force:
        raise OutputError(final, "exists already; --force replaces it")


def _claim(folder: Path, final: Path) -> int:
    """Create ``folder`` if necessary and lock it; the lock ends with the process."""
    while True:
        with writing(folder):
            folder.mkdir(exist_ok=True)
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # its content may be deleted
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(lock)
            raise OutputError(final, "another run is writing it") from exc
        # Between mkdir and flock the previous owner may have finished and removed the folder: then try again.
        if folder.is_dir() and os.stat(folder).st_ino == os.fstat(lock).st_ino:
            return lock
        os.close(lock)


def _clear(folder: Path) -> None:
    """Empty ``folder``; the record of a promotion goes last: without it a later run cannot explain the final folder."""
    with writing(folder):
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == _PROMOTING):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _promote(draft: Path, final: Path, *, force: bool) -> None:
    """One rename. With ``force`` the old and the new artifact are exchanged, so that one of them always exists."""
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
        # A file system without these flags: a plain rename refuses an existing folder, and replaces a file.
        if force and final.is_dir():
            final.rename(draft.with_name("replaced"))
        draft.rename(final)


def _renameat2(source: Path, target: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, "renameat2 is missing")
    before, after = (ctypes.c_char_p(os.fsencode(path)) for path in (source, target))
    if libc.renameat2(_AT_FDCWD, before, _AT_FDCWD, after, ctypes.c_uint(flags)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(target))


def _sync_tree(draft: Path) -> None:
    """Sync folders only: files are synced when they are written."""
    if draft.is_dir():
        for folder, _, _ in os.walk(draft):
            sync_folder(Path(folder))


def sync_folder(folder: Path) -> None:
    """Sync the entries of ``folder``, which makes a rename durable."""
    _sync(folder, os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Sync the content of a file that another process has written."""
    _sync(path, 0)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
