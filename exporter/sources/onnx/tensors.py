"""Locates the initialisers of an ONNX graph and checks their byte ranges.

Sources: TensorProto in onnx.proto3, and the page on external data in the ONNX documentation.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from onnx import TensorProto

from exporter.errors import UnreadableFile, reading
from exporter.tensors import ByteRange

#: Maximum number of axes of a numpy array.
_MAX_AXES: Final = 64

#: ONNX element type → (name of the dtype in safetensors, bits). A type that ``DTYPES`` lacks can be listed, but not
#: read.
_TYPES: Final[Mapping[int, tuple[str, int]]] = {
    TensorProto.FLOAT: ("F32", 32),
    TensorProto.DOUBLE: ("F64", 64),
    TensorProto.FLOAT16: ("F16", 16),
    TensorProto.BFLOAT16: ("BF16", 16),
    TensorProto.FLOAT8E4M3FN: ("F8_E4M3", 8),
    TensorProto.FLOAT8E5M2: ("F8_E5M2", 8),
    TensorProto.INT64: ("I64", 64),
    TensorProto.INT32: ("I32", 32),
    TensorProto.INT16: ("I16", 16),
    TensorProto.INT8: ("I8", 8),
    TensorProto.UINT64: ("U64", 64),
    TensorProto.UINT32: ("U32", 32),
    TensorProto.UINT16: ("U16", 16),
    TensorProto.UINT8: ("U8", 8),
    TensorProto.BOOL: ("BOOL", 8),
    TensorProto.INT4: ("I4", 4),
    TensorProto.UINT4: ("U4", 4),
}

#: Fields of TensorProto that contain numbers one by one, for tensors without raw_data.
_FIELDS: Final = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


@dataclass(frozen=True, slots=True)
class TensorRange:
    """An initialiser of an ONNX graph and the location of its bytes.

    dtype: the element type in safetensors' notation. place: the byte range of the external data, or None if the data is
    stored inside the model file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    place: ByteRange | None


def tensor_ranges(path: Path, tensors: Iterable[TensorProto]) -> dict[str, TensorRange]:
    """Map the name of every initialiser to its ``TensorRange``.

    Raises UnreadableFile if an initialiser is invalid or its data is missing.
    """
    ranges: dict[str, TensorRange] = {}
    for tensor in tensors:
        if text(path, tensor.name) in ranges:
            raise UnreadableFile(
                path, f"initialiser {tensor.name}: expected a unique initialiser name, found the name twice"
            )
        ranges[tensor.name] = _range(path, tensor)
    return ranges


def _range(path: Path, tensor: TensorProto) -> TensorRange:
    name, n_axes = tensor.name, len(tensor.dims)
    if n_axes > _MAX_AXES:
        raise UnreadableFile(path, f"{name}: expected a tensor with at most {_MAX_AXES} axes, found {n_axes} axes")
    shape = tuple(tensor.dims)
    if tensor.data_type not in _TYPES:
        raise UnreadableFile(path, f"{name}: expected a numeric element type, found type {tensor.data_type}")
    if any(length < 0 for length in shape):
        raise UnreadableFile(path, f"{name}: expected axis lengths of 0 or more, found shape {shape}")
    dtype, bits = _TYPES[tensor.data_type]
    nbytes = (math.prod(shape) * bits + 7) // 8
    if tensor.data_location == TensorProto.EXTERNAL:
        return TensorRange(name, dtype, shape, nbytes, _place(path, tensor, nbytes))
    given = sum(len(getattr(tensor, field)) for field in _FIELDS)
    count = nbytes if bits < 8 else math.prod(shape)  # two numbers of less than 8 bits share a byte
    if len(tensor.raw_data) != nbytes if tensor.HasField("raw_data") else given != count:
        actual = f"{len(tensor.raw_data)} bytes" if tensor.HasField("raw_data") else f"{given} numbers"
        raise UnreadableFile(path, f"{name}: expected {nbytes} bytes for {dtype} {list(shape)}, found {actual}")
    return TensorRange(name, dtype, shape, nbytes, None)


def _place(path: Path, tensor: TensorProto, nbytes: int) -> ByteRange:
    entries = {text(path, entry.key): text(path, entry.value) for entry in tensor.external_data}
    location = entries.get("location", "")
    if not _stays_inside(location):
        raise UnreadableFile(
            path, f"{tensor.name}: expected external data inside the folder of the model, found {location!r:.80}"
        )
    offset = _count(path, tensor.name, "offset", entries.get("offset", "0"))
    length = _count(path, tensor.name, "length", entries.get("length", str(nbytes)))
    if length != nbytes:
        raise UnreadableFile(path, f"{tensor.name}: expected {nbytes} bytes of external data, found length {length}")
    data = path.parent / location
    with reading(data):
        status = data.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableFile(data, f"{tensor.name}: expected external data in a regular file, found another file type")
    if offset + length > status.st_size:
        raise UnreadableFile(
            data,
            f"{tensor.name}: expected external data up to byte {offset + length}, "
            f"found a file of only {status.st_size} bytes (truncated?)",
        )
    return ByteRange(data, offset, nbytes)


def _stays_inside(location: str) -> bool:
    """Whether ``location``, the path of an external data file, stays inside the folder of the model.

    Symbolic links are not resolved, because the files in the hub's cache are links to files outside the folder.
    """
    parts = PurePosixPath(location).parts
    return bool(parts) and not location.startswith("/") and ".." not in parts and not set(location) & {"\0", "\\"}


def _count(path: Path, name: str, key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise UnreadableFile(
            path, f"{name}: {key} of the external data: expected a number of bytes, found {text!r:.40}"
        )
    return int(text)


def text(path: Path, value: str | bytes) -> str:
    """Return a string field of a protobuf message.

    Raises UnreadableFile if the value is of type bytes, which protobuf returns for text that is not UTF-8.
    """
    if isinstance(value, bytes):
        raise UnreadableFile(path, f"expected a name in UTF-8, found the bytes {value!r:.80}")
    return value
