"""The safetensors container: a checked header, and tensors that are byte ranges of the file.

Format (from the safetensors README): 8 bytes little-endian header length N, N bytes of JSON
``{name: {"dtype", "shape", "data_offsets": [begin, end]}}`` plus optional ``__metadata__``, then the data section.
Offsets count from the start of the data section, which has no holes and no overlaps.

The safetensors package is not used to read: it maps the file, so pages that were only copied would count as memory,
and it does not give a tensor's offset in the file.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporter.errors import UnreadableFile
from exporter.io.files import opened, read_at, read_exactly
from exporter.io.json_objects import parse_object
from exporter.tensors import DTYPES, Array, ByteRange, TensorSpec

#: The safetensors library's own limit: a longer header is refused before it is read.
_MAX_HEADER_BYTES: Final = 100_000_000
_LENGTH: Final = struct.Struct("<Q")
#: numpy's limit, and a size above any tensor: dimensions may be absurd even where a 0 among them leaves no data.
_MAX_AXES: Final = 64
_MAX_TENSOR_BYTES: Final = 1 << 40
#: Unit in which file systems share ranges between files.
_PAGE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor stored as a byte range of a file."""

    spec: TensorSpec
    place: ByteRange

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop), read from the file. Memory: these rows. Raises UnreadableFile if the file was cut."""
        spec, place = self.spec, self.place
        out = np.empty((stop - start, *spec.shape[1:]), DTYPES[spec.dtype])
        read_into(place.path, place.offset_bytes + start * spec.row_nbytes, out)
        return out

    def segments(self) -> Iterator[ByteRange | Array]:
        """The tensor's one range."""
        yield self.place


def read_into(path: Path, offset_bytes: int, out: Array) -> None:
    """Fill ``out`` with bytes of ``path`` from ``offset_bytes`` on. Raises UnreadableFile if the file is too short."""
    view = out.reshape(-1).view(np.uint8).data
    with opened(path) as (file, _):
        missing = len(view) - read_at(file.fileno(), view, offset_bytes)
    if missing:
        raise UnreadableFile(path, f"file ends {missing} bytes before the tensor that its header promises")


def read_tensors(path: Path) -> dict[str, FileTensor]:
    """Every tensor of ``path`` by name, in the order of their bytes; reads the header only.

    Raises UnreadableFile naming the tensor for: a header that is cut, oversized or not a JSON object; an unknown dtype;
    a shape that disagrees with its offsets; holes, overlaps, or a data section that ends early or late.
    """
    header, data_start, data_nbytes = _read_header(path)
    entries = [(name, *_check_entry(path, name, entry)) for name, entry in header.items()]
    entries.sort(key=lambda item: (item[2], item[3], item[0]))
    tensors: dict[str, FileTensor] = {}
    expected_begin = 0
    for name, spec, begin, end in entries:
        if begin != expected_begin:
            raise UnreadableFile(path, f"{name}: data expected to begin at byte {expected_begin}, found {begin}")
        if end > data_nbytes:
            raise UnreadableFile(path, f"{name}: expected data up to byte {end}, found only {data_nbytes} (truncated?)")
        tensors[name] = FileTensor(spec, ByteRange(path, data_start + begin, end - begin))
        expected_begin = end
    if expected_begin != data_nbytes:
        raise UnreadableFile(path, f"expected {expected_begin} bytes of data, found {data_nbytes}")
    return tensors


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(entries without ``__metadata__``, offset of the data section, its length); all in bytes of ``path``."""
    with opened(path) as (file, size):
        prefix = read_exactly(file, _LENGTH.size)
        if len(prefix) < _LENGTH.size:
            raise UnreadableFile(path, f"expected a safetensors header, found a file of {size} bytes")
        (length,) = _LENGTH.unpack(prefix)
        if length > (limit := min(_MAX_HEADER_BYTES, size - _LENGTH.size)):
            raise UnreadableFile(path, f"header length expected at most {limit}, found {length}")
        text = read_exactly(file, length)
    header = parse_object(path, text, what="safetensors header")
    header.pop("__metadata__", None)
    return header, _LENGTH.size + length, size - _LENGTH.size - length


def _check_entry(path: Path, name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise UnreadableFile(path, f"{name}: expected dtype, shape and data_offsets in the header, found {entry!r:.80}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnreadableFile(path, f"{name}: expected a dtype of {', '.join(DTYPES)}, found {dtype!r:.80}")
    if not _is_lengths(shape):
        raise UnreadableFile(path, f"{name}: expected a shape of non-negative integers, found {shape!r:.80}")
    if not _is_lengths(offsets) or len(offsets) != 2:
        raise UnreadableFile(path, f"{name}: expected data_offsets [begin, end], found {offsets!r:.80}")
    if len(shape) > _MAX_AXES or math.prod(max(1, n) for n in shape) * DTYPES[dtype].itemsize > _MAX_TENSOR_BYTES:
        limits = f"at most {_MAX_AXES} axes and {_MAX_TENSOR_BYTES} bytes"
        raise UnreadableFile(path, f"{name}: expected a shape of {limits}, found {shape!r:.80}")
    begin, end = offsets
    spec = TensorSpec(name, dtype, tuple(shape))
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise UnreadableFile(path, f"{name}: expected {nbytes} bytes for {dtype} {shape}, found {end - begin}")
    return spec, begin, end


def _is_lengths(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def prepare(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None, *, like_offset_bytes: int = 0
) -> tuple[bytes, list[tuple[TensorSpec, int]]]:
    """(header bytes, [(spec, offset in the file)]) of a new file with ``specs``; needs no data.

    Order: larger dtypes first, else as in ``specs``, which keeps every tensor aligned to its item size.
    like_offset_bytes: the data section gets the same offset within a page, so that a file system can share pages with
    a file that has the same data there. The header is padded with spaces for this, in steps of 8 bytes.
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
