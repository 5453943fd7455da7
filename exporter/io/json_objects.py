"""JSON objects of unknown origin: bounded in memory and depth before and after parsing, and without a key twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from exporter.errors import UnreadableFile
from exporter.io.files import read_file

#: Configs of the field have some kilobytes.
MAX_CONFIG_BYTES: Final = 16 << 20
#: Bytes of JSON may become forty times as many bytes of objects; what may come to more than this is not parsed.
_MAX_MEMORY_BYTES: Final = 128 << 20
#: A value, or a key with its place in a table: measured with CPython 3.11, keys are the dearest at 72.
_VALUE_BYTES: Final = 80
#: Below Python's own limit of recursion with room for whoever copies or writes the object.
_MAX_DEPTH: Final = 64
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def read_object(path: Path, *, max_nbytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in ``path``. Raises UnreadableFile for anything else, or for more than ``max_nbytes``."""
    return parse_object(path, read_file(path, max_nbytes=max_nbytes), what=path.name)


def parse_object(path: Path, text: bytes, *, what: str) -> dict[str, Any]:
    """The JSON object in ``text``.

    Raises UnreadableFile for anything else, for a key that stands twice, and for text that would need too much memory.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                raise UnreadableFile(path, f"{what}: {name}: expected once, found twice")
            table[name] = value
        return table

    if (nbytes := _memory_bytes(text)) > _MAX_MEMORY_BYTES:
        found = f"found some that may take {nbytes >> 20} MB"
        raise UnreadableFile(path, f"{what}: expected JSON that takes up to {_MAX_MEMORY_BYTES >> 20} MB, {found}")
    try:
        value = json.loads(text.decode(), object_pairs_hook=no_duplicates)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # half a character could be read, but not be written again
    except (ValueError, RecursionError) as exc:
        raise UnreadableFile(path, f"{what} is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise UnreadableFile(path, f"{what}: expected a JSON object, found {type(value).__name__}")
    if not _is_shallow(value):
        raise UnreadableFile(path, f"{what}: expected at most {_MAX_DEPTH} levels of nesting, found more")
    return value


def _memory_bytes(text: bytes) -> int:
    """An upper bound of what parsing takes: ``text``, the same decoded, its strings, and its values.

    A string takes one byte a character, or up to four if a character of it is not Latin.
    """
    width = 1 if text.isascii() and b"\\u" not in text else 4
    return len(text) * (1 + 2 * width) + _VALUE_BYTES * sum(map(text.count, (b",", b":", b"[", b"{")))


def _is_shallow(value: object) -> bool:
    """Level by level, for a recursive walk would fail where this is to warn."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        tables = [item for item in level if isinstance(item, dict)]
        lists = [item for item in level if isinstance(item, list)]
        if not tables and not lists:
            return True
        level = [child for table in tables for child in table.values()] + [child for each in lists for child in each]
    return False
