"""Patching a GGUF where it lies, so that a crash at any moment leaves the old model or the new one.

First the bytes that will be overwritten are written to a journal beside the model, and synced; it gets its name by a
rename, so a journal that can be found is whole. Then the model is changed and synced, then checked, then the journal is
removed: that is the moment from which the new model stands. Whoever finds a journal puts the old bytes back first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.errors import OutputError, UnreadableFile, reading, writing
from exporter.formats.gguf.patching.plan import GgufPatch
from exporter.formats.output import Progress, silent
from exporter.sources.gguf_parts import journal_of
from exporter.staging import sync_folder, write_file

_MAGIC: Final = b"TTXJ0001"
_HEAD: Final = struct.Struct("<8sQ32s")  # magic, length of the table, SHA-256 of table and bytes


@dataclass(frozen=True, slots=True)
class Change:
    """Bytes of one file to be overwritten; both have the same length."""

    path: Path
    offset_bytes: int
    old: bytes
    new: bytes


def patch_in_place(patch: GgufPatch, check: Callable[[], None], progress: Progress = silent) -> None:
    """Overwrite the changed bytes of the model's files. ``check`` is called on the result; what it raises undoes it.

    Raises OutputError if another process is at it or the device refuses; the model then is as it was.
    """
    path = patch.parts.path
    with _locked(path):
        if journal_of(path).exists():
            raise OutputError(path, "another run was interrupted here; run the patch again")
        changes = list(_changes(patch))
        _write_journal(path, changes)
        try:
            for file in dict.fromkeys(change.path for change in changes):
                pieces = [(change.offset_bytes, change.new) for change in changes if change.path == file]
                _overwrite(file, pieces)
                progress(sum(len(new) for _, new in pieces))
            check()
        except BaseException:
            _restore(path)
            raise
        _remove(journal_of(path))


def recover(path: Path) -> bool:
    """Put the old bytes back if a patch of the model at ``path`` was interrupted; whether that was so.

    Raises UnreadableFile for a journal that is broken or belongs to another file, OutputError if a run is at it now.
    """
    if not journal_of(path).exists():
        return False
    with _locked(path):
        if not journal_of(path).exists():
            return False
        _restore(path)
    return True


def _changes(patch: GgufPatch) -> Iterator[Change]:
    for file in patch.files:
        path = file.file.path
        pieces = [(0, file.header)] if file.header is not None else []
        for one in file.tensors:
            width = one.tensor.row_nbytes
            for token_id, row in zip(one.token_ids, one.encoded, strict=True):
                pieces.append((one.tensor.offset_bytes + token_id * width, row.tobytes()))
        with reading(path), path.open("rb", buffering=0) as source:
            for offset, new in pieces:
                old = os.pread(source.fileno(), len(new), offset)
                if len(old) != len(new):
                    raise UnreadableFile(path, f"expected {len(new)} bytes at {offset}, found {len(old)}")
                if old != new:
                    yield Change(path, offset, old, new)


def _write_journal(path: Path, changes: Sequence[Change]) -> None:
    """Complete and synced before it gets its name."""
    files = {change.path: change.path.stat().st_size for change in changes}
    table = json.dumps(
        {
            "files": [[one.name, size] for one, size in files.items()],
            "changes": [[list(files).index(one.path), one.offset_bytes, len(one.old)] for one in changes],
        }
    ).encode()
    body = table + b"".join(change.old for change in changes)
    journal = journal_of(path)
    draft = journal.with_name(f".{journal.name}.partial")
    with writing(draft):
        draft.unlink(missing_ok=True)
    write_file(draft, _HEAD.pack(_MAGIC, len(table), hashlib.sha256(body).digest()) + body)
    with writing(journal):
        draft.rename(journal)
        sync_folder(journal.parent)


def _restore(path: Path) -> None:
    """Write the old bytes back, then remove the journal. Interrupted, it can be done again."""
    for target, pieces in _read_journal(path).items():
        _overwrite(target, pieces)
    _remove(journal_of(path))


def _read_journal(path: Path) -> dict[Path, list[tuple[int, bytes]]]:
    """File → [(offset, old bytes)]; nothing is believed that the digest does not cover."""
    journal = journal_of(path)
    with reading(journal):
        data = journal.read_bytes()
    broken = UnreadableFile(journal, "expected the journal of an interrupted patch, found something else")
    if len(data) < _HEAD.size:
        raise broken
    magic, length, digest = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    if magic != _MAGIC or hashlib.sha256(body).digest() != digest:
        raise broken
    table = json.loads(body[:length])
    found: dict[Path, list[tuple[int, bytes]]] = {}
    paths = []
    for name, size in table["files"]:
        target = path.with_name(Path(name).name)
        with reading(target):
            held = target.stat().st_size
        if held != size:
            raise UnreadableFile(target, f"expected the {size} bytes that {journal.name} is about, found {held}")
        paths.append(target)
    at = length
    for number, offset, nbytes in table["changes"]:
        found.setdefault(paths[number], []).append((offset, body[at : at + nbytes]))
        at += nbytes
    return found


def _overwrite(path: Path, pieces: Sequence[tuple[int, bytes]]) -> None:
    with writing(path), path.open("r+b", buffering=0) as file:
        for offset, data in pieces:
            view = memoryview(data)
            while view:
                done = os.pwrite(file.fileno(), view, offset)
                view, offset = view[done:], offset + done
        os.fsync(file.fileno())


def _remove(journal: Path) -> None:
    with writing(journal):
        journal.unlink()
        sync_folder(journal.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One patch of a model at a time; the lock goes with the process."""
    with writing(path):
        fd = os.open(path, os.O_RDWR)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise OutputError(path, "another run is patching it") from exc
        yield
    finally:
        os.close(fd)
