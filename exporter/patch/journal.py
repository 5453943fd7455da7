"""Patches a model in place, protected by a journal.

After a crash at any moment, either the journal contains all bytes needed to restore the old model, or the new model is
complete.

First, the old bytes that the patch will overwrite are saved to a journal file next to the model, and the journal is
flushed to disk. The journal gets its final name by an atomic rename, so a journal under the final name is always
complete. Then the patch is written to the model, flushed to disk and verified. Finally, the journal is removed, which
commits the patch. If a later patch finds a journal next to the model, the old bytes are restored before the patch
begins.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from exporter.errors import OutputError, UnreadableFile, reading, writing
from exporter.io.files import read_file
from exporter.io.staging import sync_folder, write_file
from exporter.progress import Progress, silent
from exporter.sources.journal import journal_of

_MAGIC: Final = b"TTXJ0002"
_HEAD: Final = struct.Struct("<8sQ32s")  # magic, length of the table, SHA-256 of table and bytes

Pieces = Sequence[tuple[int, bytes]]


@dataclass(frozen=True)
class Changes:
    """The changes that an in-place patch makes to a model's files.

    pieces: maps each large file to a list of pairs (offset, new bytes), which do not change the file's length.
    contents: maps each small file to its new content, or to None if the file is to be removed.
    """

    pieces: Mapping[Path, Pieces] = field(default_factory=dict)
    contents: Mapping[Path, bytes | None] = field(default_factory=dict)


@dataclass(frozen=True)
class _Old:
    """The old bytes of one file, as saved in the journal.

    size: size of the old file in bytes, or None if the file did not exist. whole: whether ``pieces`` contains the whole
    old file instead of only the overwritten bytes.
    """

    size: int | None
    whole: bool
    pieces: Pieces


def patch_in_place(path: Path, changes: Changes, check: Callable[[], None], progress: Progress = silent) -> None:
    """Apply ``changes`` to the model file or folder ``path``; restore the old bytes if ``check`` raises an exception.

    Peak memory: the size of the overwritten bytes plus the size of the new bytes. Raises OutputError if another process
    is patching the model or if a write fails. After an error, the model is unchanged.
    """
    with _locked(path):
        if journal_of(path).exists():
            raise OutputError(
                path,
                "an in-place patch of this model was interrupted; run the patch again to restore the old bytes",
            )
        _write_journal(path, dict(_old(changes)))
        try:
            for file, pieces in changes.pieces.items():
                _overwrite(file, pieces)
                progress(sum(len(new) for _, new in pieces))
            for file, content in changes.contents.items():
                _replace(file, content)
            check()
        except BaseException:
            _restore(path)
            raise
        _remove(journal_of(path))


@contextmanager
def linked(paths: Sequence[Path]) -> Iterator[Path]:
    """Create symlinks to ``paths`` in a temporary folder, and yield the symlink to the first path.

    The function ``check`` that is passed to ``patch_in_place`` must read the model through the symlinks, because the
    functions that read a model raise an error if a journal exists next to the model.
    """
    with tempfile.TemporaryDirectory(prefix="ttexport-") as folder:
        links = []
        for path in paths:
            whole = path if path.name not in ("", "..") else path.resolve()
            links.append(Path(folder) / whole.name)
            links[-1].symlink_to(whole.absolute())
        yield links[0]


def recover(path: Path) -> bool:
    """If an in-place patch of ``path`` was interrupted, restore the old bytes. Returns whether bytes were restored.

    Raises UnreadableFile if the journal is corrupt or belongs to a different model. Raises OutputError if another
    process is patching the model.
    """
    if not journal_of(path).exists():
        return False
    with _locked(path):
        if not journal_of(path).exists():
            return False
        _restore(path)
    return True


def _old(changes: Changes) -> Iterator[tuple[Path, _Old]]:
    for path, pieces in changes.pieces.items():
        old = []
        with reading(path), path.open("rb", buffering=0) as source:
            for offset, new in pieces:
                stored = os.pread(source.fileno(), len(new), offset)
                if len(stored) != len(new):
                    raise UnreadableFile(path, f"expected {len(new)} bytes at offset {offset}, found {len(stored)}")
                old.append((offset, stored))
            yield path, _Old(os.fstat(source.fileno()).st_size, False, old)
    for path in changes.contents:
        content = read_file(path) if path.exists() else None
        yield path, _Old(None if content is None else len(content), True, [(0, content or b"")])


def _write_journal(path: Path, old: Mapping[Path, _Old]) -> None:
    """Write the journal to a temporary name, flush the journal to disk (fsync), and rename the journal."""
    files = [
        [file.relative_to(path.parent).as_posix(), was.size, was.whole, [[at, len(data)] for at, data in was.pieces]]
        for file, was in old.items()
    ]
    table = json.dumps(files).encode()
    body = table + b"".join(data for was in old.values() for _, data in was.pieces)
    journal = journal_of(path)
    draft = journal.with_name(f".{journal.name}.partial")
    with writing(draft):
        draft.unlink(missing_ok=True)
    write_file(draft, _HEAD.pack(_MAGIC, len(table), hashlib.sha256(body).digest()) + body)
    with writing(journal):
        draft.rename(journal)
        sync_folder(journal.parent)


def _restore(path: Path) -> None:
    """Write the old bytes back to the model, then remove the journal.

    If this function is interrupted, calling the function again is safe.
    """
    for target, old in _read_journal(path).items():
        if old.whole:
            _replace(target, None if old.size is None else old.pieces[0][1])
        else:
            _overwrite(target, old.pieces)
    _remove(journal_of(path))


def _read_journal(path: Path) -> dict[Path, _Old]:
    """Read the journal of the model at ``path``. Returns a dict that maps each file to the file's old bytes.

    Raises UnreadableFile if the journal's digest is wrong, or if the journal belongs to a different model.
    """
    journal = journal_of(path)
    with reading(journal):
        data = journal.read_bytes()
    broken = UnreadableFile(journal, "expected a valid journal of an interrupted patch, found invalid content")
    if len(data) < _HEAD.size:
        raise broken
    magic, length, digest = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    if magic != _MAGIC or hashlib.sha256(body).digest() != digest:
        raise broken
    old: dict[Path, _Old] = {}
    at = length
    for name, size, whole, spans in json.loads(body[:length]):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise broken
        target = path.parent / name
        if not whole:
            with reading(target):
                nbytes = target.stat().st_size
            if nbytes != size:
                raise UnreadableFile(target, f"expected {size} bytes (recorded in {journal.name}), found {nbytes}")
        pieces = []
        for offset, span_nbytes in spans:
            pieces.append((offset, body[at : at + span_nbytes]))
            at += span_nbytes
        old[target] = _Old(size, whole, pieces)
    return old


def _overwrite(path: Path, pieces: Pieces) -> None:
    with writing(path), path.open("r+b", buffering=0) as file:
        overwrite(file.fileno(), pieces)
        os.fsync(file.fileno())


def overwrite(fd: int, pieces: Pieces) -> None:
    """Write each pair (offset, bytes) of ``pieces`` to the file descriptor ``fd``. Raises OSError if a write fails."""
    for offset, data in pieces:
        view = memoryview(data)
        while view:
            done = os.pwrite(fd, view, offset)
            view, offset = view[done:], offset + done


def _replace(path: Path, content: bytes | None) -> None:
    """Replace the whole content of a file, or remove the file if ``content`` is None.

    If this function is interrupted, calling the function again is safe.
    """
    with writing(path):
        if content is None:
            path.unlink(missing_ok=True)
        else:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                overwrite(fd, [(0, content)])
                os.ftruncate(fd, len(content))
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_folder(path.parent)


def _remove(journal: Path) -> None:
    with writing(journal):
        journal.unlink()
        sync_folder(journal.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock the model at ``path`` against patches by other processes. The lock is released when the process ends."""
    with writing(path):
        fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise OutputError(path, "another process is patching this model") from exc
        yield
    finally:
        os.close(fd)
