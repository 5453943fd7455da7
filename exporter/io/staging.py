"""Builds an output in a staging folder, and renames the complete, verified output to its final path in one step.

The staging folder is named ``.NAME.partial`` and is in the same folder as the final path. While a process writes to the
staging folder, an advisory lock prevents a second process from using the folder. If the process is killed, the lock is
released, and the next run either deletes the folder or resumes from the folder.
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
#: Name of a file in a resumable staging folder, with device and inode of the folder that is about to be renamed.
_PROMOTING: Final = "promoting"


@contextmanager
def staged(final: Path, *, force: bool) -> Iterator[Path]:
    """Yield a draft path at which the ``with`` block creates a file or a folder.

    If the ``with`` block succeeds, the draft is renamed to ``final``. For a split GGUF, the ``with`` block may instead
    write all parts to the folder of the draft path. After the ``with`` block, all parts are moved to the folder of
    ``final``. The first part is moved last, because readers open the first part to find the other parts. If the
    ``with`` block raises an exception, the staging folder is removed and ``final`` stays unchanged. Raises OutputError
    if ``final`` exists and ``force`` is not set, or if another run is writing ``final``.
    """
    _require_name(final)
    _refuse_existing(final, force=force)
    folder = staging_folder(final)
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
    """A staging folder that remains after its process ends, so that a later run can resume.

    draft: the folder that will be renamed to ``final``. keep: whether the staging folder is kept after an error, so
    that a later run can resume. promoted: whether the previous run already renamed its draft to ``final``, so that the
    current run only has to remove the staging folder.
    """

    folder: Path
    draft: Path
    keep: bool = False
    promoted: bool = False


def staging_folder(final: Path) -> Path:
    """Path of the staging folder, which exists while a run writes ``final`` and after an interrupted run."""
    return final.with_name(f".{final.name}.partial")


@contextmanager
def resumable(final: Path, *, force: bool, resume: bool) -> Iterator[Stage]:
    """Stage a folder as ``staged`` does, but keep the draft after an error, so that a run with ``resume`` can continue.

    If ``force`` is set and ``resume`` is not set, an existing draft is deleted and the run starts from the beginning.
    Raises OutputError if ``final`` exists and ``force`` is not set, if another run is writing ``final``, or if an
    earlier run left a staging folder and neither ``resume`` nor ``force`` is set.
    """
    _require_name(final)
    folder = staging_folder(final)
    if not resume:
        _refuse_existing(final, force=force)
    lock = _claim(folder, final)
    stage = Stage(folder, folder / final.name, keep=True)
    try:
        stage.promoted = resume and _is_promoted(folder, final)
        if not stage.promoted:
            _refuse_existing(final, force=force)
            if any(folder.iterdir()) and not (resume or force):
                reason = "an interrupted run left this folder; use --resume to continue or --force to start over"
                raise OutputError(folder, reason)
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
    """Whether a draft exists that an interrupted run left or that another run is still writing.

    An empty staging folder, which may remain after a process was killed during clean-up, is removed and not reported as
    a draft.
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
    """Record the inode of the draft in the staging folder, then rename the draft to ``final``.

    A later run compares the recorded inode with the inode of ``final`` to detect that the draft was renamed.
    """
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
    """Raise OutputError if the folder of ``out`` is not writable or if fewer than ``nbytes`` bytes are free.

    Raises OutputError.
    """
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise OutputError(out, f"the output needs {nbytes} bytes, but only {free} bytes are free")
    if not os.access(parent, os.W_OK):
        raise OutputError(parent, "no permission to write to this folder")


def write_file(path: Path, content: bytes) -> None:
    """Write a small new file, creating its folder if necessary, and flush the file to disk. Raises OutputError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(path, content)


def _require_name(final: Path) -> None:
    if final.name in ("", ".."):
        raise OutputError(
            final, "expected the path of a new file or folder, found a path such as . or .. that always exists"
        )


def _refuse_existing(final: Path, *, force: bool) -> None:
    if os.path.lexists(final) and not force:
        raise OutputError(final, "the output exists already; use --force to replace the output")


def _claim(folder: Path, final: Path) -> int:
    """Create ``folder`` if necessary, and lock ``folder`` until the process ends."""
    with writing(folder):
        final.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with writing(folder):
            folder.mkdir(exist_ok=True)
            # No symlink is followed, because the content of the folder may be deleted.
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(lock)
            raise OutputError(final, "another run is writing this output") from exc
        # Between mkdir and flock the previous owner may have finished and removed the folder. If so, try again.
        if folder.is_dir() and os.stat(folder).st_ino == os.fstat(lock).st_ino:
            return lock
        os.close(lock)


def _clear(folder: Path) -> None:
    """Delete the contents of the staging folder ``folder``.

    The file with the recorded inode of the draft is deleted last, because a later run needs the inode to detect that
    ``final`` is complete.
    """
    with writing(folder):
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == _PROMOTING):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _promote(draft: Path, final: Path, *, force: bool) -> None:
    """Rename the draft to the final path.

    With ``force``, a single system call exchanges the old and the new artifact, so that ``final`` exists at every
    moment.
    """
    try:
        if force and os.path.lexists(final):
            _renameat2(draft, final, _RENAME_EXCHANGE)
        else:
            _renameat2(draft, final, _RENAME_NOREPLACE)
    except FileExistsError as exc:
        raise OutputError(final, "another run finished this output first; use --force to replace the output") from exc
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        # On a file system without the flags, a plain rename refuses an existing folder and replaces an existing file.
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
    """Flush the directory entries of ``draft`` and of all its subfolders to disk (fsync).

    The contents of the files in ``draft`` were already flushed to disk when the files were written.
    """
    if draft.is_dir():
        for folder, _, _ in os.walk(draft):
            sync_folder(Path(folder))


def sync_folder(folder: Path) -> None:
    """Flush the directory entries of ``folder`` to disk (fsync), so that a rename in ``folder`` is durable."""
    _sync(folder, os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Flush the file ``path`` to disk (fsync); another process may have written the file."""
    _sync(path, 0)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
