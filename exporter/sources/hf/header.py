"""Reads and checks the JSON header of a safetensors file, which has an entry for each tensor.

The headers of a large mixture of experts have more than 100,000 entries. Therefore, a header with only valid and
ordinary entries is decoded by msgspec, which is faster than the json module by a factor of ten. Any other header is
read entry by entry, to name the invalid entry.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from exporter.errors import UnreadableFile
from exporter.io.json_objects import check_memory, parse_object
from exporter.tensors import DTYPES, TensorSpec

#: Key of the header's optional entry that describes no tensor.
_METADATA: Final = "__metadata__"
_WHAT: Final = "safetensors header"
#: Maximum number of axes (numpy's limit), and a size above any tensor. Both are checked because a shape that contains a
#: 0 has no data, but may still have absurd other dimensions.
_MAX_AXES: Final = 64
_MAX_TENSOR_BYTES: Final = 1 << 40

#: Begin and end of the tensor in the data section, name of the tensor, and the tensor's spec.
Entry = tuple[int, int, str, TensorSpec]
_Length = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class _Tensor(msgspec.Struct, frozen=True, gc=False):
    """An entry of the header. All fields have defaults, because the entry ``__metadata__`` has none of them."""

    dtype: str = ""
    shape: tuple[_Length, ...] = ()
    data_offsets: tuple[_Length, _Length] = (0, 0)


_DECODER: Final = msgspec.json.Decoder(dict[str, _Tensor])
_KEYS: Final = tuple(f'"{name}"'.encode() for name in _Tensor.__struct_fields__)


def header_entries(path: Path, text: bytes) -> list[Entry]:
    """Return a tuple (begin, end, name, spec) for each tensor in the header ``text`` of the file ``path``.

    begin, end: byte offsets of the tensor in the data section, which may lie outside of the file. Raises
    UnreadableFile, naming the tensor, if the header is not a JSON object, has a duplicate key, an entry without dtype,
    shape or offsets, an unknown dtype, a shape that contradicts the offsets, or an absurd size.
    """
    check_memory(path, text, what=_WHAT)
    entries = _ordinary(text)
    if entries is not None:
        return entries
    header = parse_object(path, text, what=_WHAT)
    header.pop(_METADATA, None)
    return [_checked(path, name, entry) for name, entry in header.items()]


def _ordinary(text: bytes) -> list[Entry] | None:
    """Return the entries, or None if the header has an invalid entry or must be read more carefully.

    msgspec keeps the last of two equal keys without an error. Duplicate keys are detected by counting: "dtype", "shape"
    and "data_offsets" must each occur in the header exactly once per tensor. A header with a tensor of such a name is
    therefore read more carefully, too.
    """
    if b"\\" in text:
        return None
    try:
        header = _DECODER.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    metadata = header.pop(_METADATA, None)
    ordinary = metadata in (None, _Tensor()) and text.count(_METADATA.encode()) <= 1
    if not ordinary or any(text.count(key) != len(header) for key in _KEYS):
        return None
    entries = []
    for name, tensor in header.items():
        dtype, shape, (begin, end) = tensor.dtype, tensor.shape, tensor.data_offsets
        if dtype not in DTYPES or len(shape) > _MAX_AXES:
            return None
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        if end - begin != nbytes or not 0 < nbytes <= _MAX_TENSOR_BYTES:
            return None
        entries.append((begin, end, name, TensorSpec(name, dtype, shape)))
    return entries


def _checked(path: Path, name: str, entry: Any) -> Entry:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise UnreadableFile(path, f"{name}: expected dtype, shape and data_offsets in the header, found {entry!r:.80}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnreadableFile(path, f"{name}: expected one of the dtypes {', '.join(DTYPES)}, found {dtype!r:.80}")
    if not _is_lengths(shape):
        raise UnreadableFile(path, f"{name}: expected a shape of non-negative integers, found {shape!r:.80}")
    if not _is_lengths(offsets) or len(offsets) != 2:
        raise UnreadableFile(path, f"{name}: expected data_offsets [begin, end], found {offsets!r:.80}")
    itemsize = DTYPES[dtype].itemsize
    nbytes = math.prod(shape) * itemsize
    extent = nbytes or math.prod(max(1, n) for n in shape) * itemsize
    if len(shape) > _MAX_AXES or extent > _MAX_TENSOR_BYTES:
        raise UnreadableFile(
            path,
            f"{name}: expected a tensor of at most {_MAX_AXES} axes and {_MAX_TENSOR_BYTES} bytes, "
            f"found shape {shape!r:.80}",
        )
    begin, end = offsets
    spec = TensorSpec(name, dtype, tuple(shape))
    if end - begin != nbytes:
        raise UnreadableFile(
            path, f"{name}: expected {nbytes} bytes for dtype {dtype} and shape {shape}, found {end - begin} bytes"
        )
    return begin, end, name, spec


def _is_lengths(value: object) -> bool:
    if not isinstance(value, list) or not {type(item) for item in value} <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) < 1 << 63)
