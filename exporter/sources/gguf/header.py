"""Parses the header of a GGUF file in one pass.

The parser checks every read against the file size and limits the number of Python objects that it creates. Metadata
arrays are skipped during parsing and decoded on demand, so opening a file with a vocabulary of 150,000 tokens takes
hardly longer than opening a file with a vocabulary of 50 tokens.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporter.errors import UnreadableFile
from exporter.sources.gguf.types import ARRAY, BOOL, DEFAULT_ALIGNMENT, MAGIC, SCALARS, STRING, TENSOR_TYPES, VERSION
from exporter.sources.hf.safetensors import read_into

#: Maximum length of a header. Longer headers are refused; the largest known vocabularies have about 20 MB.
MAX_HEADER_BYTES: Final = 64 << 20
#: Limits on the number of Python objects created from keys, tensors and text. Every limit is far above any known model.
_MAX_KEYS: Final = 1 << 12
_MAX_TENSORS: Final = 1 << 16
_MAX_TEXT_BYTES: Final = 16 << 20
_MAX_STRINGS: Final = 1 << 21
_MAX_KEY_BYTES: Final = 65535
_MAX_NAME_BYTES: Final = 64
_MAX_DIMS: Final = 4
_MAX_ELEMENTS: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class GgufArray:
    """A metadata array that is not decoded from the file until ``values`` is called.

    ``item_type`` is the number that GGUF assigns to the type of the array's items.
    """

    path: Path
    item_type: int
    count: int
    offset_bytes: int
    nbytes: int

    def values(self) -> list[Any]:
        """Decode the array.

        Strings are decoded to str, and bytes that are not UTF-8 become surrogate code points. Raises UnreadableFile.
        """
        data = np.empty(self.nbytes, np.uint8)
        read_into(self.path, self.offset_bytes, data)
        if self.item_type != STRING:
            return list(data.view(SCALARS[self.item_type]).tolist())
        raw, at, out = data.tobytes(), 0, []
        for _ in range(self.count):
            start = at + 8
            at = start + int.from_bytes(raw[at:start], "little")
            out.append(raw[start:at].decode("utf-8", "surrogateescape"))
        return out


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a GGUF file.

    type: the name of the tensor type in ggml. shape: the lengths of the axes in numpy's order, that is, with the
    fastest-varying axis last. offset_bytes: offset of the tensor from the start of the file. A row of a tensor consists
    of all values along the last axis for one index of the other axes. Every row is quantised independently of all other
    rows.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset_bytes: int
    nbytes: int

    @property
    def n_rows(self) -> int:
        """Number of rows of the tensor: the product of the lengths of all axes except the last."""
        return math.prod(self.shape[:-1])

    @property
    def row_nbytes(self) -> int:
        """Size of a row of the tensor in bytes."""
        return self.nbytes // self.n_rows if self.n_rows else 0


@dataclass(frozen=True)
class Header:
    """The parsed header of a GGUF file. The fields have the same meanings as the fields of ``GgufFile``."""

    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    alignment: int
    data_offset: int


class Scanner:
    """Reads the header of a GGUF file in one pass. Before every read, the parser checks that enough bytes remain."""

    def __init__(self, path: Path, view: mmap.mmap, limit: int, size: int) -> None:
        """view: the memory-mapped file. limit: maximum size of the header in bytes. size: size of the file in bytes."""
        self.path, self.view, self.limit, self.size = path, view, limit, size
        self.at = 0
        self.text_nbytes = 0
        self.what = "header"

    def scan(self) -> Header:
        """Parse the whole header. Raises UnreadableFile, naming the invalid key or tensor, if the header is invalid."""
        version, n_tensors, n_keys = self._preamble()
        metadata: dict[str, Any] = {}
        for index in range(n_keys):
            self.what = f"key {index}"
            key = self._name(_MAX_KEY_BYTES)
            self.what = f"key {key}"
            if key in metadata:
                raise self._bad("expected a unique metadata key, found the key twice")
            metadata[key] = self._value()
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise UnreadableFile(self.path, f"general.alignment: expected a power of two, found {alignment!r:.80}")
        entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for index in range(n_tensors):
            self.what = f"tensor {index}"
            name = self._name(_MAX_NAME_BYTES)
            self.what = name
            if name in entries:
                raise self._bad("expected a unique tensor name, found the name twice")
            entries[name] = self._tensor_entry()
        start = -(-self.at // alignment) * alignment
        tensors = self._place(entries, start, alignment)
        return Header(version, metadata, tensors, alignment, start)

    def value_of(self, wanted: str) -> Any:
        """Return the value of the metadata key ``wanted``, or None if the file lacks the key.

        The function reads the header only up to the key ``wanted``. Raises UnreadableFile.
        """
        for index in range(self._preamble()[2]):
            self.what = f"key {index}"
            key = self._name(_MAX_KEY_BYTES)
            self.what = f"key {key}"
            value = self._value()
            if key == wanted:
                return value
        return None

    def _bad(self, reason: str) -> UnreadableFile:
        return UnreadableFile(self.path, f"{self.what}: {reason}")

    def _take(self, nbytes: int) -> int:
        """Skip ``nbytes`` bytes and return the offset of the first skipped byte."""
        start = self.at
        if nbytes > self.limit - start:
            raise self._bad(
                f"expected {nbytes} more header bytes at offset {start}, found {self.limit - start} (truncated?)"
            )
        self.at = start + nbytes
        return start

    def _number(self, code: str) -> Any:
        return struct.unpack_from(code, self.view, self._take(struct.calcsize(code)))[0]

    def _preamble(self) -> tuple[int, int, int]:
        if (magic := self.view[self._take(4) : 4]) != MAGIC:
            raise UnreadableFile(self.path, f"expected a GGUF file, found the magic bytes {magic!r}")
        version = self._number("<I")
        if version not in (2, VERSION):
            order = " (big-endian?)" if version and not version & 0xFFFF else ""
            raise UnreadableFile(self.path, f"expected GGUF version 2 or {VERSION}, found version {version}{order}")
        n_tensors, n_keys = self._number("<Q"), self._number("<Q")
        # The shortest key takes 13 bytes and the shortest tensor entry 24 bytes, so larger counts cannot be valid.
        if n_keys * 13 + n_tensors * 24 > self.limit - self.at:
            raise self._bad(
                f"{n_tensors} tensors and {n_keys} metadata keys do not fit into a header of {self.limit} bytes"
            )
        if n_keys > _MAX_KEYS or n_tensors > _MAX_TENSORS:
            raise self._bad(
                f"expected at most {_MAX_TENSORS} tensors and {_MAX_KEYS} metadata keys, "
                f"found {n_tensors} tensors and {n_keys} metadata keys"
            )
        return version, n_tensors, n_keys

    def _take_text(self, nbytes: int) -> bytes:
        self.text_nbytes += nbytes
        if self.text_nbytes > _MAX_TEXT_BYTES:
            raise self._bad(
                f"expected at most {_MAX_TEXT_BYTES} bytes of text in the header, found at least {self.text_nbytes}"
            )
        start = self._take(nbytes)
        return self.view[start : self.at]

    def _text(self, nbytes: int) -> str:
        return self._take_text(nbytes).decode("utf-8", "surrogateescape")

    def _name(self, limit: int) -> str:
        nbytes = self._number("<Q")
        if not 0 < nbytes <= limit:
            raise self._bad(f"expected a key or tensor name of 1 to {limit} bytes, found {nbytes} bytes")
        try:
            return self._take_text(nbytes).decode()
        except UnicodeDecodeError as exc:
            raise self._bad("expected a name in UTF-8, found bytes that are not UTF-8") from exc

    def _value(self) -> Any:
        value_type = self._number("<I")
        if value_type in SCALARS:
            dtype = SCALARS[value_type]
            start = self._take(dtype.itemsize)
            if value_type == BOOL and self.view[start] > 1:
                raise self._bad(f"expected 0 or 1 for a boolean, found byte {self.view[start]}")
            return np.frombuffer(self.view[start : self.at], dtype)[0].item()
        if value_type == STRING:
            return self._text(self._number("<Q"))
        if value_type == ARRAY:
            return self._array()
        raise self._bad(f"expected a metadata value type from 0 to 12, found {value_type}")

    def _array(self) -> GgufArray:
        item_type, count = self._number("<I"), self._number("<Q")
        start = self.at
        if item_type in SCALARS:
            self._take(count * SCALARS[item_type].itemsize)
        elif item_type == STRING:
            if count * 8 > self.limit - start:
                raise self._bad(
                    f"an array of {count} strings does not fit into the remaining {self.limit - start} header bytes"
                )
            if count > _MAX_STRINGS:
                raise self._bad(f"expected an array of at most {_MAX_STRINGS} strings, found {count} strings")
            self._skip_strings(count)
        else:
            raise self._bad(f"expected an array of numbers or strings, found item type {item_type}")
        return GgufArray(self.path, item_type, count, start, self.at - start)

    def _skip_strings(self, count: int) -> None:
        """Skip ``count`` strings by reading only the length of each string.

        Skipping the strings takes most of the time that is needed to open a file with a large vocabulary.
        """
        at, limit, view, unpack = self.at, self.limit - 8, self.view, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at > limit:
                break
            at += 8 + unpack(view, at)[0]
        else:
            if at <= self.limit:
                self.at = at
                return
        raise self._bad(f"the strings of the array extend past the end of the header at byte {self.limit} (truncated?)")

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read the header entry of a tensor and return (type, shape, size in bytes, offset in the data section)."""
        n_dims = self._number("<I")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self._bad(f"expected a tensor with 1 to {_MAX_DIMS} axes, found {n_dims} axes")
        shape = tuple(self._number("<Q") for _ in range(n_dims))[::-1]
        number, offset = self._number("<I"), self._number("<Q")
        if number not in TENSOR_TYPES:
            raise self._bad(f"expected a known tensor type, found type number {number}")
        name, block, block_nbytes = TENSOR_TYPES[number]
        if 0 in shape or math.prod(shape) > _MAX_ELEMENTS:
            raise self._bad(
                f"expected axis lengths of 1 or more and at most {_MAX_ELEMENTS} elements, found shape {shape}"
            )
        if shape[-1] % block:
            raise self._bad(f"expected a row length divisible by {block} for type {name}, found row length {shape[-1]}")
        return name, shape, math.prod(shape) // block * block_nbytes, offset

    def _place(
        self, entries: Mapping[str, tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, GgufTensor]:
        """Return the tensors in the order of their data in the file.

        As llama.cpp requires, the data of the tensors must have no gaps except for the alignment padding.
        """
        tensors: dict[str, GgufTensor] = {}
        expected = 0
        for name, (ggml_type, shape, nbytes, offset) in sorted(entries.items(), key=lambda item: item[1][3]):
            self.what = name
            if offset != expected:
                raise self._bad(f"expected tensor data at offset {expected}, found offset {offset}")
            if start + offset + nbytes > self.size:
                end = start + offset + nbytes
                raise self._bad(
                    f"expected tensor data up to byte {end}, found a file of {self.size} bytes (truncated?)"
                )
            tensors[name] = GgufTensor(name, ggml_type, shape, start + offset, nbytes)
            expected = -(-(offset + nbytes) // alignment) * alignment
        return tensors
