"""The GGUF container, written: typed keys, tensor entries with their offsets, alignment. Knows nothing of models.

Everything before the data section is made in memory first, so that the size of the file is known before a byte of it
exists. Strings are joined in one go: a key-by-key writer spends seconds on a vocabulary.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np

from exporter.errors import BadInput
from exporter.sources.gguf.types import (
    ARRAY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    SCALARS,
    STRING,
    TENSOR_TYPES,
    TYPE_NUMBERS,
    VERSION,
)

ALIGNMENT: Final = DEFAULT_ALIGNMENT
_LENGTH: Final = struct.Struct("<Q")
_NUMBERS: Final = {"u8": 0, "u32": 4, "i32": 5, "f32": 6, "bool": 7}


@dataclass(frozen=True, slots=True)
class Key:
    """A metadata key with its value already in the format's bytes, type number included."""

    name: str
    encoded: bytes


def u32(name: str, value: int) -> Key:
    """A count or an id."""
    return _scalar(name, "u32", value)


def i32(name: str, value: int) -> Key:
    """A signed number."""
    return _scalar(name, "i32", value)


def f32(name: str, value: float) -> Key:
    """A number, rounded to float32."""
    return _scalar(name, "f32", value)


def truth(name: str, value: bool) -> Key:
    """A flag."""
    return _scalar(name, "bool", value)


def text(name: str, value: str) -> Key:
    """A string."""
    return Key(name, struct.pack("<I", STRING) + _string(value))


def texts(name: str, values: Sequence[str]) -> Key:
    """An array of strings."""
    try:
        encoded = [value.encode("utf-8", "surrogateescape") for value in values]
    except UnicodeEncodeError as exc:
        raise _no_text(str(exc.object)) from exc
    pieces = chain.from_iterable(zip(map(_LENGTH.pack, map(len, encoded)), encoded, strict=True))
    return Key(name, struct.pack("<IIQ", ARRAY, STRING, len(values)) + b"".join(pieces))


def i32s(name: str, values: Sequence[int]) -> Key:
    """An array of signed numbers."""
    head = struct.pack("<IIQ", ARRAY, _NUMBERS["i32"], len(values))
    return Key(name, head + np.asarray(values, "<i4").tobytes())


def f32s(name: str, values: Sequence[float]) -> Key:
    """An array of numbers, each rounded to float32."""
    head = struct.pack("<IIQ", ARRAY, _NUMBERS["f32"], len(values))
    return Key(name, head + np.asarray(values, "<f4").tobytes())


def bytes8(name: str, value: bytes) -> Key:
    """An array of bytes."""
    return Key(name, struct.pack("<IIQ", ARRAY, _NUMBERS["u8"], len(value)) + value)


def _scalar(name: str, kind: str, value: float) -> Key:
    number = _NUMBERS[kind]
    try:
        with np.errstate(over="raise"):
            data = np.asarray(value, SCALARS[number]).tobytes()
    except (OverflowError, FloatingPointError) as exc:
        raise BadInput(f"{name}: expected a number that {kind} can hold, found {value}") from exc
    return Key(name, struct.pack("<I", number) + data)


def _string(value: str) -> bytes:
    try:
        data = value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as exc:
        raise _no_text(value) from exc
    return _LENGTH.pack(len(data)) + data


def _no_text(value: str) -> BadInput:
    return BadInput(f"{value!r:.80}: expected text, found half of a surrogate pair")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Name, ggml type name and shape in numpy's order of a tensor to write."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data, without padding."""
        return row_nbytes(self.type, math.prod(self.shape))


def row_nbytes(kind: str, elements: int) -> int:
    """Bytes of ``elements`` values of a type; they must fill whole blocks."""
    _, block, block_nbytes = TENSOR_TYPES[TYPE_NUMBERS[kind]]
    assert elements % block == 0, (kind, elements)
    return elements // block * block_nbytes


def fits(kind: str, width: int) -> bool:
    """Whether rows of ``width`` elements come in whole blocks of the type."""
    return width % TENSOR_TYPES[TYPE_NUMBERS[kind]][1] == 0


def header(
    keys: Sequence[Key], entries: Sequence[TensorEntry], *, alignment: int = ALIGNMENT, version: int = VERSION
) -> tuple[bytes, int]:
    """(all bytes before the data section, size of the whole file).

    Tensors follow in the order of ``entries``, each padded to ``alignment``, the last one too.
    """
    names = [key.name for key in keys]
    assert len(set(names)) == len(names), "a metadata key stands twice"
    parts = [MAGIC, struct.pack("<IQQ", version, len(entries), len(keys))]
    for key in keys:
        parts += (_string(key.name), key.encoded)
    offset = 0
    for entry in entries:
        lengths = entry.shape[::-1]
        parts += (
            _string(entry.name),
            struct.pack(f"<I{len(lengths)}Q", len(lengths), *lengths),
            struct.pack("<IQ", TYPE_NUMBERS[entry.type], offset),
        )
        offset += padded(entry.nbytes, alignment)
    head = b"".join(parts)
    head += b"\0" * (padded(len(head), alignment) - len(head))
    return head, len(head) + offset


def padded(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of ``alignment``."""
    return -(-nbytes // alignment) * alignment
