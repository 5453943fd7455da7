"""Change, add or remove one key in the header of a GGUF file, whatever its length."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from exporter.formats.gguf.writer import Key
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.header import GgufArray, Scanner
from exporter.sources.gguf.types import SCALARS


def replace(path: Path, key: Key) -> None:
    """Give an existing key another value and type."""
    start, end = span(path, key.name)
    _rewrite(path, start, end, key.encoded, 0)


def remove(path: Path, name: str) -> None:
    """Remove a key from the header."""
    start, end = span(path, name)
    _rewrite(path, start - len(name.encode()) - 8, end, b"", -1)


def add(path: Path, key: Key) -> None:
    """Add a key before the others."""
    name = key.name.encode()
    _rewrite(path, 24, 24, struct.pack("<Q", len(name)) + name + key.encoded, 1)


def values(path: Path, name: str) -> Any:
    """The value of a key; a list for an array."""
    value = GgufFile.open(path).metadata[name]
    return value.values() if isinstance(value, GgufArray) else value


def header_nbytes(path: Path) -> int:
    """Where the header ends, before the padding."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        scanner = Scanner(path, view, len(view), len(view))
        scanner.scan()
        return scanner.at


def keys_nbytes(path: Path) -> int:
    """Where the keys end and the table of tensors begins."""
    return max(span(path, name)[1] for name in GgufFile.open(path).metadata)


def span(path: Path, name: str) -> tuple[int, int]:
    """Start and end of the type and value of a key, in bytes."""
    content = path.read_bytes()
    encoded = struct.pack("<Q", len(name.encode())) + name.encode()
    start = content.index(encoded) + len(encoded)
    value = GgufFile.open(path).metadata[name]
    type_number = struct.unpack_from("<I", content, start)[0]
    if isinstance(value, GgufArray):
        return start, value.offset_bytes + value.nbytes
    if type_number in SCALARS:
        return start, start + 4 + SCALARS[type_number].itemsize
    return start, start + 12 + struct.unpack_from("<Q", content, start + 4)[0]


def _rewrite(path: Path, start: int, end: int, encoded: bytes, keys: int) -> None:
    """Tensors keep their offsets, which count from the aligned end of the header."""
    file, content = GgufFile.open(path), path.read_bytes()
    count = struct.unpack_from("<Q", content, 16)[0]
    header = content[:16] + struct.pack("<Q", count + keys) + content[24:start] + encoded
    header += content[end : header_nbytes(path)]
    path.write_bytes(header + b"\0" * (-len(header) % file.alignment) + content[file.data_offset :])
