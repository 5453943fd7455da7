"""Computes SHA-256 digests of files, and caches the digests. The cache key is a file's inode, size and times.

Because of the cache, a large base model is hashed only for the first release that uses the base model. If a file is
rewritten in place, the times of the file change, and the cached digest is no longer used. The digest of a file that was
modified within the last few seconds is not cached, because a file system may store the same time for two modifications
within two seconds.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from exporter.io.atomic import write_atomically
from exporter.io.files import opened

_BLOCK_BYTES: Final = 1 << 20
#: File systems keep times in steps of up to two seconds.
_SETTLED_SECONDS: Final = 3


@dataclass
class FileDigests:
    """A cache of file digests. The cache key is the inode, the size and the times of a file.

    folder: the folder in which the digests are stored for later runs, or None to cache the digests only in memory.
    """

    folder: Path | None = None
    known: dict[str, str] = field(default_factory=dict)

    def of(self, path: Path) -> str:
        """Return the SHA-256 digest of the file ``path`` as a hexadecimal string.

        Raises UnreadableFile if reading fails.
        """
        with opened(path) as (file, _):
            status = os.fstat(file.fileno())
            key = _key(status)
            digest = self.known.get(key) or self._cached(key)
            if digest is None:
                hasher = hashlib.sha256()
                while block := file.read(_BLOCK_BYTES):
                    hasher.update(block)
                digest = hasher.hexdigest()
                if _key(os.fstat(file.fileno())) != key:
                    return digest  # another process writes the file, so the digest is not cached
                self._cache(key, digest, status)
        self.known[key] = digest
        return digest

    def of_all(self, paths: Iterable[Path]) -> dict[Path, str]:
        """Return a dict that maps each path to the digest of the file. Several files are read in parallel."""
        listed = list(paths)
        with ThreadPoolExecutor(min(4, len(listed) or 1)) as pool:
            return dict(zip(listed, pool.map(self.of, listed), strict=True))

    def below(self, folder: Path) -> dict[str, str]:
        """Return a dict, sorted by path, from the relative path of each file below ``folder`` to the file's digest."""
        return {
            path.relative_to(folder).as_posix(): digest for path, digest in self.of_all(files_below(folder)).items()
        }

    def _cached(self, key: str) -> str | None:
        try:
            digest = (self.folder / key[:2] / key).read_text() if self.folder else ""
        except (OSError, UnicodeDecodeError):
            return None
        return digest if len(digest) == hashlib.sha256().digest_size * 2 else None

    def _cache(self, key: str, digest: str, status: os.stat_result) -> None:
        if self.folder is None or time.time() - max(status.st_mtime, status.st_ctime) < _SETTLED_SECONDS:
            return
        write_atomically(self.folder / key[:2] / key, digest.encode())


def files_below(folder: Path) -> list[Path]:
    """Return all files below ``folder``, sorted by name."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def digest_of(value: bytes) -> str:
    """Return the SHA-256 digest of ``value`` as a hexadecimal string."""
    return hashlib.sha256(value).hexdigest()


def sizes_match(folder: Path, files: Mapping[str, int]) -> bool:
    """Whether ``folder`` contains exactly the files that ``files`` lists, with the sizes that ``files`` lists.

    files: maps each relative path to the size in bytes.
    """
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files_below(folder)} == dict(files)


def _key(status: os.stat_result) -> str:
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return digest_of(" ".join(map(str, identity)).encode())
