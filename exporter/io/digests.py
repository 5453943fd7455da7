"""sha256 of files, each read once: what was hashed before is known again by inode, size and times.

A base of many gigabytes is hashed by the first release that uses it. Whoever rewrites a file in place changes its
times; a file that was changed a moment ago is not remembered, for a second change might leave no trace.
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
    """Digests by what ``stat`` says. folder: where they are kept from run to run; None: for this process only."""

    folder: Path | None = None
    known: dict[str, str] = field(default_factory=dict)

    def of(self, path: Path) -> str:
        """sha256 of the file at ``path``, in hexadecimal. Raises UnreadableFile."""
        with opened(path) as (file, _):
            status = os.fstat(file.fileno())
            key = _key(status)
            held = self.known.get(key) or self._kept(key)
            if held is None:
                digest = hashlib.sha256()
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
                held = digest.hexdigest()
                if _key(os.fstat(file.fileno())) != key:
                    return held  # it is being written: only these bytes have this digest
                self._keep(key, held, status)
        self.known[key] = held
        return held

    def of_all(self, paths: Iterable[Path]) -> dict[Path, str]:
        """The digests of several files, read at the same time."""
        listed = list(paths)
        with ThreadPoolExecutor(min(4, len(listed) or 1)) as pool:
            return dict(zip(listed, pool.map(self.of, listed), strict=True))

    def below(self, folder: Path) -> dict[str, str]:
        """Name below ``folder``, with slashes → digest, of every file there, in the order of names."""
        return {
            path.relative_to(folder).as_posix(): digest for path, digest in self.of_all(files_below(folder)).items()
        }

    def _kept(self, key: str) -> str | None:
        try:
            held = (self.folder / key[:2] / key).read_text() if self.folder else ""
        except (OSError, UnicodeDecodeError):
            return None
        return held if len(held) == hashlib.sha256().digest_size * 2 else None

    def _keep(self, key: str, digest: str, status: os.stat_result) -> None:
        if self.folder is None or time.time() - max(status.st_mtime, status.st_ctime) < _SETTLED_SECONDS:
            return
        write_atomically(self.folder / key[:2] / key, digest.encode())


def files_below(folder: Path) -> list[Path]:
    """Every file below ``folder``, in the order of names."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def digest_of(value: bytes) -> str:
    """sha256 of ``value``, in hexadecimal."""
    return hashlib.sha256(value).hexdigest()


def sizes_match(folder: Path, files: Mapping[str, int]) -> bool:
    """Whether the files below ``folder`` are these, by name and size."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files_below(folder)} == dict(files)


def _key(status: os.stat_result) -> str:
    parts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return digest_of(" ".join(map(str, parts)).encode())
