"""A store of artifacts.

Each entry of a store is a folder with one artifact. The name of the folder is the digest of the artifact's recipe, that
is, of all values that determine the bytes of the artifact. An artifact is made on first use; on every later use, the
digests of the stored files are checked. Several processes can use a store at the same time. While a process makes an
entry, it holds a lock on the name of the entry, and it renames the entry to that name when the entry is complete. If
the bytes of an entry have changed (because of a disk error or a manual edit), the entry is deleted and made again. The
folder of the store can be removed at any time between runs.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from exporter.errors import OutputError, TTExportError, writing
from exporter.io.digests import FileDigests, digest_of, sizes_match
from exporter.io.staging import sync_folder, write_file

#: Incremented when entries of older versions must no longer be used.
_SCHEMA: Final = 2
_RECORD: Final = "entry.json"
_CONTENT: Final = "content"


class _StoredFile(msgspec.Struct, frozen=True):
    """The size and digest of one stored file."""

    nbytes: int
    sha256: str


class _Entry(msgspec.Struct, frozen=True):
    """The content of ``entry.json``."""

    schema: int
    files: dict[str, _StoredFile]


@dataclass
class Store:
    """A store of artifacts in the folder ``folder``.

    digests: digests of the files that this process has already hashed, so that no file is hashed twice.
    """

    folder: Path
    digests: FileDigests = field(default_factory=FileDigests)

    def get(self, recipe: Mapping[str, Any], build: Callable[[Path], None]) -> tuple[Path, bool]:
        """Return (folder with the artifact made from ``recipe``, whether the artifact was already in the store).

        If the store does not have the artifact yet, ``build`` is called with an empty folder and must write the
        artifact into that folder. Raises OutputError and any error that ``build`` raises.
        """
        key = digest_of(json.dumps({"schema": _SCHEMA, **recipe}, sort_keys=True).encode())
        place = self.folder / key[:2] / key
        if self._is_whole(place):
            return place / _CONTENT, True
        with self._locked(place):
            if self._is_whole(place):
                return place / _CONTENT, True
            draft = place.with_name(f"{key}.partial")
            with writing(draft):
                for stale in (draft, place):
                    if os.path.lexists(stale):
                        shutil.rmtree(stale)
                (draft / _CONTENT).mkdir(parents=True)
            try:
                build(draft / _CONTENT)
                self._finish(draft, place)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
        return place / _CONTENT, False

    def _finish(self, draft: Path, place: Path) -> None:
        content = draft / _CONTENT
        files = {
            name: _StoredFile((content / name).stat().st_size, digest)
            for name, digest in self.digests.below(content).items()
        }
        write_file(draft / _RECORD, msgspec.json.encode(_Entry(_SCHEMA, files)))
        with writing(place):
            sync_folder(content)
            draft.rename(place)
            sync_folder(place.parent)

    def _is_whole(self, place: Path) -> bool:
        try:
            entry = msgspec.json.decode((place / _RECORD).read_bytes(), type=_Entry)
            content = place / _CONTENT
            sized = sizes_match(content, {name: file.nbytes for name, file in entry.files.items()})
            return sized and self.digests.below(content) == {name: file.sha256 for name, file in entry.files.items()}
        except (OSError, msgspec.MsgspecError, TTExportError):
            return False

    @contextmanager
    def _locked(self, place: Path) -> Iterator[None]:
        """Hold the lock of a store entry in the ``with`` body, so that only one process at a time makes the entry.

        The kernel releases the lock when the process ends; the lock file is kept.
        """
        path = place.with_name(f"{place.name}.lock")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


@dataclass(frozen=True)
class Cache:
    """A cache, shared by all releases, that contains artifacts made from bases and digests of input files."""

    folder: Path

    @classmethod
    def of_user(cls) -> Cache:
        """Return the cache in the user's cache folder (``XDG_CACHE_HOME``, by default ``~/.cache``)."""
        return cls(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttexport" / "release")

    def require_writable(self) -> None:
        """Create the cache folder if the cache folder does not exist.

        Raises OutputError if the cache folder is not writable.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK):
            raise OutputError(self.folder, "no permission to write to this folder")

    @property
    def artifacts(self) -> Path:
        """The subfolder of the cache that contains the artifacts, as a ``Store``."""
        return self.folder / "artifacts"

    @property
    def digests(self) -> Path:
        """The subfolder of the cache in which ``FileDigests`` keeps the digests of input files."""
        return self.folder / "digests"
