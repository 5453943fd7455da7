"""Serialise the GGUF container: typed keys, tensor entries with their offsets, alignment. Knows nothing of models.

Everything before the data section is built in memory first, so the size of the file is known before a byte is
written. Strings are joined in one go: a key-by-key writer spends seconds on a vocabulary.
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
_VALUE_TYPES: Final = {"u8": 0, "u32": 4, "i32": 5, "f32": 6, "bool": 7}


@dataclass(frozen=True, slots=True)
class Key:
    """A metadata key with its value in the bytes of the format, type number included."""

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
        raise _not_unicode(str(exc.object)) from exc
    parts = chain.from_iterable(zip(map(_LENGTH.pack, map(len, encoded)), encoded, strict=True))
    return Key(name, struct.pack("<IIQ", ARRAY, STRING, len(values)) + b"".join(parts))


def i32s(name: str, values: Sequence[int]) -> Key:
    """An array of signed numbers."""
    head = struct.pack("<IIQ", ARRAY, _VALUE_TYPES["i32"], len(values))
    return Key(name, head + np.asarray(values, "<i4").tobytes())


def f32s(name: str, values: Sequence[float]) -> Key:
    """An array of numbers, each rounded to float32."""
    head = struct.pack("<IIQ", ARRAY, _VALUE_TYPES["f32"], len(values))
    return Key(name, head + np.asarray(values, "<f4").tobytes())


def bytes8(name: str, value: bytes) -> Key:
    """An array of bytes."""
    return Key(name, struct.pack("<IIQ", ARRAY, _VALUE_TYPES["u8"], len(value)) + value)


def _scalar(name: str, value_type: str, value: float) -> Key:
    number = _VALUE_TYPES[value_type]
    try:
        with np.errstate(over="raise"):
            data = np.asarray(value, SCALARS[number]).tobytes()
    except (OverflowError, FloatingPointError) as exc:
        raise BadInput(f"{name}: expected a number that {value_type} can hold, found {value}") from exc
    return Key(name, struct.pack("<I", number) + data)


def _string(value: str) -> bytes:
    try:
        data = value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as exc:
        raise _not_unicode(value) from exc
    return _LENGTH.pack(len(data)) + data


def _not_unicode(value: str) -> BadInput:
    return BadInput(f"{value!r:.80}: expected text, found half of a surrogate pair")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor to write: its name, ggml's name of its type, and its shape in numpy's order."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data, without padding."""
        return encoded_nbytes(self.type, math.prod(self.shape))


def encoded_nbytes(tensor_type: str, elements: int) -> int:
    """Bytes of ``elements`` values of a type; they must fill whole blocks."""
    _, block, block_nbytes = TENSOR_TYPES[TYPE_NUMBERS[tensor_type]]
    assert elements % block == 0, (tensor_type, elements)
    return elements // block * block_nbytes


def header(
    keys: Sequence[Key], entries: Sequence[TensorEntry], *, alignment: int = ALIGNMENT, version: int = VERSION
) -> tuple[bytes, int]:
    """(all bytes before the data section, size of the whole file in bytes).

    Tensors follow in the order of ``entries``. Each is padded to ``alignment``, including the last.
    """
    names = [key.name for key in keys]
    assert len(set(names)) == len(names), "duplicate metadata key"
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
