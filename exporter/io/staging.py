"""Nothing gets its final name until it is complete and verified: a staging folder beside the target, then one rename.

The staging folder ``.NAME.partial`` is held by an advisory lock while its process lives. The folder
of a killed process is not locked: the next run clears it or resumes from it. A second concurrent run is refused.
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

_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1
_RENAME_EXCHANGE: Final = 2
#: In a staging folder that can be gone on with: which folder is about to get its final name.
_PROMOTING: Final = "promoting"


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
    folder = staging_folder(final)
    with writing(folder):
        final.parent.mkdir(parents=True, exist_ok=True)
    lock = _claim(folder, final)
    try:
        _clear(folder)
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


@dataclass
class Stage:
    """A staging folder that outlives its process. draft: the folder that will be ``final``, which exists.

    keep: whether an error leaves it behind, for another run to go on with. promoted: the run before got as far as
    giving ``final`` its name, and only this folder is left of it.
    """

    folder: Path
    draft: Path
    keep: bool = False
    promoted: bool = False


def staging_folder(final: Path) -> Path:
    """The staging folder of ``final``; it is there while a run writes, and after one that was interrupted."""
    return final.with_name(f".{final.name}.partial")


@contextmanager
def resumable(final: Path, *, force: bool, resume: bool) -> Iterator[Stage]:
    """As ``staged`` for a folder, but what was done is kept for a run with ``resume``; ``force`` alone starts over.

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
                raise OutputError(folder, "left by an interrupted run; --resume goes on with it, --force starts over")
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
    """Whether an interrupted run left something to go on with, or is still at it.

    A run may have been killed when all but the empty folder was removed: that is removed here.
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
    except OSError:  # it is held, or not empty
        return True
    finally:
        os.close(lock)
    return False


def _discard(folder: Path) -> None:
    with suppress(OutputError):
        _clear(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _promote_folder(stage: Stage, final: Path, *, force: bool) -> None:
    """Give the draft its name, after noting which folder it is: only so a later run can tell that it happened."""
    status = stage.draft.stat()
    write_file(stage.folder / _PROMOTING, f"{status.st_dev} {status.st_ino}".encode())
    with writing(final):
        sync_folder(stage.folder)
        _sync_tree(stage.draft)
        _promote(stage.draft, final, force=force)
        sync_folder(final.parent)


def _is_promoted(folder: Path, final: Path) -> bool:
    try:
        noted, status = (folder / _PROMOTING).read_text().split(), final.stat()
    except OSError:
        return False
    return noted == [str(status.st_dev), str(status.st_ino)]


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
    """Create ``folder`` if it is missing and lock it; the lock goes with the process."""
    while True:
        with writing(folder):
            folder.mkdir(exist_ok=True)
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # its content may be deleted
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(lock)
            raise OutputError(final, "another run is writing it") from exc
        # Between mkdir and flock the folder's last owner may have finished and removed it: then start over.
        if folder.is_dir() and os.stat(folder).st_ino == os.fstat(lock).st_ino:
            return lock
        os.close(lock)


def _clear(folder: Path) -> None:
    """The note of what was promoted goes last: without it nobody knows why the final folder exists."""
    with writing(folder):
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == _PROMOTING):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


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
