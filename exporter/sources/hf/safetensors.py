"""Reads safetensors files: checks the header, and gives access to every tensor as a byte range of the file.

According to the README of safetensors, a file begins with the header length N as an 8-byte little-endian integer. The
header consists of N bytes of JSON, ``{name: {"dtype", "shape", "data_offsets": [begin, end]}}``, plus an optional key
``__metadata__``. The data section comes after the header. The offsets of the tensors count from the start of the data
section, which has no gaps and no overlaps. There are two reasons why ttexport does not read files with the safetensors
package. First, the safetensors package memory-maps the file, so that all accessed pages would count towards peak
memory, even if the bytes are only copied to another file. Second, the safetensors package does not report the offset of
a tensor in the file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporter.errors import UnreadableFile
from exporter.io.files import opened, read_at, read_exactly
from exporter.sources.hf.header import header_entries
from exporter.tensors import DTYPES, Array, ByteRange, TensorSpec

#: Maximum length of a header, as in the safetensors library. A longer header is refused before the header is read.
_MAX_HEADER_BYTES: Final = 100_000_000
_LENGTH: Final = struct.Struct("<Q")
#: Number of bytes of the unit in which file systems share ranges between files.
_PAGE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor that is stored as a byte range of a file."""

    spec: TensorSpec
    place: ByteRange

    def rows(self, start: int, stop: int) -> Array:
        """Read the rows [start, stop) of the tensor from the file. Peak memory: the returned rows.

        Raises UnreadableFile if the file was truncated after opening.
        """
        spec, place = self.spec, self.place
        out = np.empty((stop - start, *spec.shape[1:]), DTYPES[spec.dtype])
        read_into(place.path, place.offset_bytes + start * spec.row_nbytes, out)
        return out

    def segments(self) -> Iterator[ByteRange | Array]:
        """Return the single byte range that contains the whole tensor."""
        yield self.place


def read_into(path: Path, offset_bytes: int, out: Array) -> None:
    """Fill the buffer ``out`` with the bytes of the file ``path``, starting at ``offset_bytes``.

    Raises UnreadableFile if the file ends before ``out`` is full.
    """
    view = out.reshape(-1).view(np.uint8).data
    with opened(path) as (file, _):
        missing = len(view) - read_at(file.fileno(), view, offset_bytes)
    if missing:
        raise UnreadableFile(
            path, f"the file ends {missing} bytes before the end of a tensor that the header lists (truncated?)"
        )


def read_tensors(path: Path) -> dict[str, FileTensor]:
    """Read the header of ``path``, and map the name of every tensor to its ``FileTensor`` in the order of the data.

    Tensor data is not read. Raises UnreadableFile, naming the tensor, in the following cases: a header that is
    truncated, oversized or not a JSON object; an unknown dtype; a shape that contradicts the offsets; gaps or overlaps
    between tensors; a data section that does not end with the last tensor.
    """
    text, data_start, data_nbytes = _read_header(path)
    tensors: dict[str, FileTensor] = {}
    expected_begin = 0
    for begin, end, name, spec in sorted(header_entries(path, text)):
        if begin != expected_begin:
            raise UnreadableFile(path, f"{name}: expected tensor data at offset {expected_begin}, found offset {begin}")
        if end > data_nbytes:
            raise UnreadableFile(
                path, f"{name}: expected data up to byte {end}, found only {data_nbytes} bytes (truncated?)"
            )
        tensors[name] = FileTensor(spec, ByteRange(path, data_start + begin, end - begin))
        expected_begin = end
    if expected_begin != data_nbytes:
        raise UnreadableFile(path, f"expected {expected_begin} bytes of tensor data, found {data_nbytes} bytes")
    return tensors


def _read_header(path: Path) -> tuple[bytes, int, int]:
    """Return (JSON text of the header, offset of the data section, length of the data section)."""
    with opened(path) as (file, size):
        prefix = read_exactly(file, _LENGTH.size)
        if len(prefix) < _LENGTH.size:
            raise UnreadableFile(path, f"expected a safetensors header, found a file of only {size} bytes")
        (length,) = _LENGTH.unpack(prefix)
        if length > (limit := min(_MAX_HEADER_BYTES, size - _LENGTH.size)):
            raise UnreadableFile(path, f"expected a header of at most {limit} bytes, found a header length of {length}")
        text = read_exactly(file, length)
    return text, _LENGTH.size + length, size - _LENGTH.size - length


def prepare(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None, *, like_offset_bytes: int = 0
) -> tuple[bytes, list[tuple[TensorSpec, int]]]:
    """Plan the layout of a new file that contains ``specs``, and return (header bytes, [(spec, offset in the file)]).

    Tensors with larger item sizes come first, so that every tensor is aligned to its item size; tensors of equal item
    size keep the order of ``specs``. like_offset_bytes: offset of the data section in another file that contains equal
    data, or 0 if there is no such file. The new data section starts at the same offset within a memory page as the data
    section of the other file, so that a file system can share pages of equal data between the two files. To reach that
    offset, the header is padded with spaces in steps of 8 bytes.
    """
    order = sorted(specs, key=lambda spec: -DTYPES[spec.dtype].itemsize)
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    places = []
    for spec in order:
        end = begin + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
        places.append((spec, begin))
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if like_offset_bytes % 8 == 0 and like_offset_bytes:
        text += b" " * ((like_offset_bytes - _LENGTH.size - len(text)) % _PAGE_BYTES)
    start = _LENGTH.size + len(text)
    return _LENGTH.pack(len(text)) + text, [(spec, start + offset) for spec, offset in places]
