"""Parses untrusted JSON objects with limits on memory and nesting depth. Duplicate keys are refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, Final

from exporter.errors import UnreadableFile
from exporter.io.files import read_file

#: Published configs have a few kilobytes.
MAX_CONFIG_BYTES: Final = 16 << 20
#: Parsed objects may take forty times as many bytes as the JSON text. Text that may need more memory than this limit is
#: not parsed.
_MAX_MEMORY_BYTES: Final = 128 << 20
#: Upper bound of the bytes of a value, or of a key and its table entry. In CPython 3.11, a key takes 72 bytes, which is
#: the largest measured size.
_VALUE_BYTES: Final = 80
#: Maximum depth. This depth is well below Python's recursion limit, so that the object can also be copied and written.
_MAX_DEPTH: Final = 64
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def read_object(path: Path, *, max_nbytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read the JSON object in the file ``path``, and return the object as a dict.

    Raises UnreadableFile if the file does not contain a JSON object or is larger than ``max_nbytes``.
    """
    return parse_object(path, read_file(path, max_nbytes=max_nbytes), what=path.name)


def as_json(value: object) -> bytes:
    """Serialise JSON like transformers' configs: two-space indentation, keys in insertion order, a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def parse_object(path: Path, text: bytes, *, what: str) -> dict[str, Any]:
    """Parse the JSON object in ``text``.

    Raises UnreadableFile if ``text`` is not a JSON object, has duplicate keys, would need too much memory, or is nested
    too deeply. path: the file that contains ``text``, for error messages. what: the name of ``text`` in error messages.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            name = next(name for name, count in counts.items() if count > 1)
            raise UnreadableFile(path, f"{what}: {name}: expected a unique key, found the same key twice")
        return table

    check_memory(path, text, what=what)
    try:
        value = json.loads(text.decode(), object_pairs_hook=no_duplicates)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate can be read, but cannot be written again
    except (ValueError, RecursionError) as exc:
        raise UnreadableFile(path, f"{what} is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise UnreadableFile(path, f"{what}: expected a JSON object, found {type(value).__name__}")
    if not _is_shallow(value):
        raise UnreadableFile(path, f"{what}: expected at most {_MAX_DEPTH} levels of nesting, found more levels")
    return value


def check_memory(path: Path, text: bytes, *, what: str) -> None:
    """Raise UnreadableFile if parsing the JSON ``text`` may need too much memory."""
    if (nbytes := _memory_bytes(text)) > _MAX_MEMORY_BYTES:
        raise UnreadableFile(
            path,
            f"{what}: expected JSON that needs at most {_MAX_MEMORY_BYTES >> 20} MB of memory, "
            f"found JSON that may need {nbytes >> 20} MB",
        )


def _memory_bytes(text: bytes) -> int:
    """Return an upper bound on the memory in bytes that is needed to parse ``text``.

    The upper bound includes ``text`` and the parsed object. A character of a parsed string counts as one byte if
    ``text`` is ASCII without Unicode escapes, else as four bytes.
    """
    width = 1 if text.isascii() and b"\\u" not in text else 4
    return len(text) * (1 + 2 * width) + _VALUE_BYTES * sum(map(text.count, (b",", b":", b"[", b"{")))


def _is_shallow(value: object) -> bool:
    """Whether ``value`` has at most ``_MAX_DEPTH`` levels of nesting.

    The function visits the nesting levels in a loop, because recursion would fail on a very deeply nested object.
    """
    level = [value]
    for _ in range(_MAX_DEPTH):
        tables = [item for item in level if isinstance(item, dict)]
        lists = [item for item in level if isinstance(item, list)]
        if not tables and not lists:
            return True
        level = [child for table in tables for child in table.values()] + [child for each in lists for child in each]
    return False
