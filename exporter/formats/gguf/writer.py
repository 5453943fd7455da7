"""Serialise the header of a GGUF file: metadata keys, tensor entries with offsets, and padding.

All bytes before the data section of the GGUF are built in memory, so the file size is known before writing starts. The
strings of an array are joined in a single call, because it would take seconds to write the tokens of a vocabulary one
by one.
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
    """A GGUF metadata key: its name, its type number, and its value encoded as bytes."""

    name: str
    encoded: bytes


def u32(name: str, value: int) -> Key:
    """Return a GGUF metadata key with an unsigned 32-bit integer, such as a count or a token id."""
    return _scalar(name, "u32", value)


def i32(name: str, value: int) -> Key:
    """Return a GGUF metadata key with a signed 32-bit integer."""
    return _scalar(name, "i32", value)


def f32(name: str, value: float) -> Key:
    """Return a GGUF metadata key with ``value`` rounded to float32."""
    return _scalar(name, "f32", value)


def truth(name: str, value: bool) -> Key:
    """Return a GGUF metadata key with a boolean value."""
    return _scalar(name, "bool", value)


def text(name: str, value: str) -> Key:
    """Return a GGUF metadata key with a string value."""
    return Key(name, struct.pack("<I", STRING) + _string(value))


def texts(name: str, values: Sequence[str]) -> Key:
    """Return a GGUF metadata key with an array of strings."""
    try:
        encoded = [value.encode("utf-8", "surrogateescape") for value in values]
    except UnicodeEncodeError as exc:
        raise _not_unicode(str(exc.object)) from exc
    parts = chain.from_iterable(zip(map(_LENGTH.pack, map(len, encoded)), encoded, strict=True))
    return Key(name, struct.pack("<IIQ", ARRAY, STRING, len(values)) + b"".join(parts))


def i32s(name: str, values: Sequence[int]) -> Key:
    """Return a GGUF metadata key with an array of signed 32-bit integers."""
    head = struct.pack("<IIQ", ARRAY, _VALUE_TYPES["i32"], len(values))
    return Key(name, head + np.asarray(values, "<i4").tobytes())


def f32s(name: str, values: Sequence[float]) -> Key:
    """Return a GGUF metadata key with an array of numbers that are rounded to float32."""
    head = struct.pack("<IIQ", ARRAY, _VALUE_TYPES["f32"], len(values))
    return Key(name, head + np.asarray(values, "<f4").tobytes())


def truths(name: str, values: Sequence[bool]) -> Key:
    """Return a GGUF metadata key with an array of boolean values."""
    head = struct.pack("<IIQ", ARRAY, _VALUE_TYPES["bool"], len(values))
    return Key(name, head + np.asarray(values, np.uint8).tobytes())


def bytes8(name: str, value: bytes) -> Key:
    """Return a GGUF metadata key with an array of bytes."""
    return Key(name, struct.pack("<IIQ", ARRAY, _VALUE_TYPES["u8"], len(value)) + value)


def _scalar(name: str, value_type: str, value: float) -> Key:
    number = _VALUE_TYPES[value_type]
    try:
        with np.errstate(over="raise"):
            data = np.asarray(value, SCALARS[number]).tobytes()
    except (OverflowError, FloatingPointError) as exc:
        raise BadInput(f"{name}: expected a number in the range of {value_type}, found {value}") from exc
    return Key(name, struct.pack("<I", number) + data)


def _string(value: str) -> bytes:
    try:
        data = value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as exc:
        raise _not_unicode(value) from exc
    return _LENGTH.pack(len(data)) + data


def _not_unicode(value: str) -> BadInput:
    return BadInput(f"{value!r:.80}: expected valid Unicode text, found an unpaired surrogate")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The entry of a tensor in a GGUF: its name, its ggml type name, and its shape in numpy's order."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes, without padding."""
        return encoded_nbytes(self.type, math.prod(self.shape))


def encoded_nbytes(tensor_type: str, elements: int) -> int:
    """Size in bytes of ``elements`` values in a ggml type.

    The number of values must be a multiple of the type's block size.
    """
    _, block, block_nbytes = TENSOR_TYPES[TYPE_NUMBERS[tensor_type]]
    assert elements % block == 0, (tensor_type, elements)
    return elements // block * block_nbytes


def header(
    keys: Sequence[Key], entries: Sequence[TensorEntry], *, alignment: int = ALIGNMENT, version: int = VERSION
) -> tuple[bytes, int]:
    """Return (all bytes of a GGUF before its data section, size of the whole GGUF in bytes).

    The data section of a GGUF contains the tensors in the order of ``entries``, and each tensor is padded to a multiple
    of ``alignment`` bytes.
    """
    names = [key.name for key in keys]
    assert len(set(names)) == len(names), "expected unique metadata keys, found a duplicate"
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
    """Round ``nbytes`` up to a multiple of ``alignment``."""
    return -(-nbytes // alignment) * alignment
