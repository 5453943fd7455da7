"""ONNX models as files: initialisers as byte ranges, and which of them is the embedding and which the head.

Reads the graph (small, where the weights lie in files of their own) and no weight. Works on models of any tool.
Sources: onnx.proto3 (TensorProto), the ONNX page on external data.
"""

from __future__ import annotations

import math
import mmap
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no stubs
from onnx import TensorProto, numpy_helper

from exporter.errors import NotExpressible, UnreadableFile, reading
from exporter.sources.files import opened, read_exactly
from exporter.sources.onnx_folder import model_files
from exporter.sources.onnx_graph import BlockForm, find_uses
from exporter.sources.onnx_scan import check_cost
from exporter.sources.safetensors import read_into
from exporter.tensors import DTYPES, Array, ByteRange

#: protobuf itself stops here; more is no ONNX file.
_MAX_MODEL_BYTES: Final = 2 << 30
#: numpy's limit.
_MAX_AXES: Final = 64

#: ONNX element type → (safetensors' spelling, bits). Spellings that ``DTYPES`` lacks can be listed, not read.
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

#: The fields of TensorProto that hold numbers one by one, for tensors without raw_data.
_FIELDS: Final = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


@dataclass(frozen=True, slots=True)
class TensorRange:
    """An initialiser: dtype in safetensors' spelling, and where its bytes lie (None: inside the model file)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    place: ByteRange | None


@dataclass(frozen=True)
class OnnxFile:
    """A model file and its external data.

    path: the model file. inputs, outputs: names, in the graph's order, inputs without initialisers. metadata: the
    model's metadata_props. embedding: the initialiser that a Gather on input_ids reads. head: the one in the matrix
    product that gives the logits. None where the graph has no such thing. token_axis: of these two, the axis that
    counts tokens: 0 for (V, H), 1 for (H, V). blocks: of these two, how codes are to be read, for those that hold
    codes. quantised: some product in the graph is one of integers.
    """

    path: Path
    initialisers: Mapping[str, TensorRange]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metadata: Mapping[str, str]
    embedding: str | None
    head: str | None
    token_axis: Mapping[str, int]
    blocks: Mapping[str, BlockForm]
    quantised: bool
    _inline: Mapping[str, TensorProto] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> OnnxFile:
        """Open a model file, or the first that ``model_files`` finds in a folder.

        Raises UnreadableFile, naming the initialiser, for: anything that is no ONNX model; an element type that is
        not known; external data outside the folder, missing, not a plain file, or shorter than promised; a length
        that disagrees with the shape.
        """
        path = model_files(path)[0]
        model = _parse(path)
        graph = model.graph
        initialisers = _ranges(path, graph.initializer)
        uses = find_uses(graph, {name: len(one.shape) for name, one in initialisers.items()})
        found = [use for use in (uses.head, uses.embedding) if use]
        return cls(
            path=path,
            initialisers=initialisers,
            inputs=tuple(_text(path, value.name) for value in graph.input if value.name not in initialisers),
            outputs=tuple(_text(path, value.name) for value in graph.output),
            metadata={_text(path, prop.key): _text(path, prop.value) for prop in model.metadata_props},
            embedding=uses.embedding.name if uses.embedding else None,
            head=uses.head.name if uses.head else None,
            token_axis={use.name: use.token_axis for use in found},
            blocks={use.name: use.blocks for use in found if use.blocks},
            quantised=uses.quantised,
            _inline={one.name: one for one in graph.initializer if initialisers[one.name].place is None},
        )

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of an initialiser along its first axis; a scalar is one row. Memory: these rows.

        Raises NotExpressible for an element type that numpy cannot hold, UnreadableFile for data that is not there.
        """
        tensor = self.initialisers[name]
        if tensor.place is None:
            return self._inline_value(tensor).reshape(tensor.shape or (1,))[start:stop]
        out = np.empty((stop - start, *tensor.shape[1:]), self._dtype(tensor))
        read_into(
            tensor.place.path, tensor.place.offset_bytes + start * math.prod(tensor.shape[1:]) * out.itemsize, out
        )
        return out

    def token_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows of tokens [start, stop) of the embedding or the head, (n, H), whichever way the matrix lies.

        Memory: these rows; for a matrix (H, V) the pages of the file that they touch. Raises as ``rows`` does.
        """
        tensor = self.initialisers[name]
        if not self.token_axis[name]:
            return self.rows(name, start, stop)
        if tensor.place is None:
            return np.ascontiguousarray(self._inline_value(tensor)[:, start:stop].T)
        place = tensor.place
        try:
            with reading(place.path):
                mapped = np.memmap(place.path, self._dtype(tensor), "r", place.offset_bytes, tensor.shape)
        except ValueError as exc:  # an empty matrix, or a file that got shorter
            raise UnreadableFile(place.path, f"{name}: {exc}") from exc
        return np.ascontiguousarray(mapped[:, start:stop].T)

    def parts(self, name: str) -> list[TensorRange]:
        """What makes the matrix ``name``, one row a token each: itself, or codes, scales and zero points."""
        form = self.blocks.get(name)
        names = [name, form.scales, form.zero_points] if form else [name]
        return [self.initialisers[one] for one in names if one is not None]

    def token_bytes(self, name: str, start: int, stop: int) -> Array:
        """Rows of tokens [start, stop) as they are stored, the ``parts`` side by side: (n, bytes) uint8."""
        if self.token_axis[name]:
            rows = self.token_rows(name, start, stop)
            return rows.view(np.uint8).reshape(len(rows), -1)
        stored = []
        for part in self.parts(name):
            width = part.nbytes // part.shape[0]
            if part.place is None:
                whole = np.frombuffer(self._inline[part.name].raw_data, np.uint8).reshape(-1, width)
                stored.append(whole[start:stop])
            else:
                stored.append(np.empty((stop - start, width), np.uint8))
                read_into(part.place.path, part.place.offset_bytes + start * width, stored[-1])
        return np.concatenate(stored, axis=1)

    def token_places(self, name: str, token_id: int) -> list[ByteRange]:
        """Where ``token_bytes`` of one token lie. Raises NotExpressible for rows that are no such ranges."""
        places = []
        for part in self.parts(name):
            if part.place is None or self.token_axis[name]:
                raise NotExpressible(f"{self.path}: {part.name}", "its rows are no ranges of an external data file")
            width = part.nbytes // part.shape[0]
            places.append(ByteRange(part.place.path, part.place.offset_bytes + token_id * width, width))
        return places

    def _inline_value(self, tensor: TensorRange) -> Array:
        dtype = self._dtype(tensor)
        value: Array = numpy_helper.to_array(self._inline[tensor.name])
        return value.view(dtype) if value.dtype.itemsize == dtype.itemsize else value.astype(dtype)

    def _dtype(self, tensor: TensorRange) -> np.dtype[Any]:
        if tensor.dtype not in DTYPES:
            reason = f"values of {tensor.dtype} are not read by this version"
            raise NotExpressible(f"{self.path}: {tensor.name}", reason)
        return DTYPES[tensor.dtype]


def _parse(path: Path) -> onnx.ModelProto:
    with opened(path) as (file, size):
        if size > _MAX_MODEL_BYTES:
            raise UnreadableFile(path, f"expected at most {_MAX_MODEL_BYTES} bytes of ONNX, found {size}")
        if not size:
            raise UnreadableFile(path, "expected an ONNX model, found an empty file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            check_cost(path, view)
        content = read_exactly(file, size)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except (DecodeError, ValueError) as exc:
        raise UnreadableFile(path, "expected an ONNX model, found bytes that protobuf cannot parse") from exc
    if not model.ir_version or not model.graph.node or not model.graph.output:
        raise UnreadableFile(path, "expected an ONNX model, found no graph in it")
    return model


def _ranges(path: Path, tensors: Iterable[TensorProto]) -> dict[str, TensorRange]:
    ranges: dict[str, TensorRange] = {}
    for tensor in tensors:
        if _text(path, tensor.name) in ranges:
            raise UnreadableFile(path, f"initialiser {tensor.name}: expected once, found twice")
        ranges[tensor.name] = _range(path, tensor)
    return ranges


def _range(path: Path, tensor: TensorProto) -> TensorRange:
    name, n_axes = tensor.name, len(tensor.dims)
    if n_axes > _MAX_AXES:
        raise UnreadableFile(path, f"{name}: expected at most {_MAX_AXES} axes, found {n_axes}")
    shape = tuple(tensor.dims)
    if tensor.data_type not in _TYPES:
        raise UnreadableFile(path, f"{name}: expected a numeric element type, found type {tensor.data_type}")
    if any(length < 0 for length in shape):
        raise UnreadableFile(path, f"{name}: expected lengths of 0 or more, found shape {shape}")
    dtype, bits = _TYPES[tensor.data_type]
    nbytes = (math.prod(shape) * bits + 7) // 8
    if tensor.data_location == TensorProto.EXTERNAL:
        return TensorRange(name, dtype, shape, nbytes, _place(path, tensor, nbytes))
    given = sum(len(getattr(tensor, field)) for field in _FIELDS)
    count = nbytes if bits < 8 else math.prod(shape)  # numbers below a byte come in packed pairs
    if len(tensor.raw_data) != nbytes if tensor.HasField("raw_data") else given != count:
        found = f"{len(tensor.raw_data)} bytes" if tensor.HasField("raw_data") else f"{given} numbers"
        raise UnreadableFile(path, f"{name}: expected {nbytes} bytes for {dtype} {list(shape)}, found {found}")
    return TensorRange(name, dtype, shape, nbytes, None)


def _place(path: Path, tensor: TensorProto, nbytes: int) -> ByteRange:
    told = {_text(path, entry.key): _text(path, entry.value) for entry in tensor.external_data}
    location = told.get("location", "")
    if not _stays_inside(location):
        raise UnreadableFile(path, f"{tensor.name}: expected external data inside the folder, found {location!r:.80}")
    offset = _count(path, tensor.name, "offset", told.get("offset", "0"))
    length = _count(path, tensor.name, "length", told.get("length", str(nbytes)))
    if length != nbytes:
        raise UnreadableFile(path, f"{tensor.name}: expected {nbytes} bytes for its shape, found length {length}")
    data = path.parent / location
    with reading(data):
        status = data.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableFile(data, f"{tensor.name}: expected a plain file of external data, found another kind")
    if offset + length > status.st_size:
        expected = f"{tensor.name}: expected data up to byte {offset + length}"
        raise UnreadableFile(data, f"{expected}, found only {status.st_size} (truncated?)")
    return ByteRange(data, offset, nbytes)


def _stays_inside(location: str) -> bool:
    """Judged by the text: a data file may itself be a link, which is how hub caches store it."""
    parts = PurePosixPath(location).parts
    return bool(parts) and not location.startswith("/") and ".." not in parts and not set(location) & {"\0", "\\"}


def _count(path: Path, name: str, key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise UnreadableFile(path, f"{name}: {key} of its external data: expected a count of bytes, found {text!r:.40}")
    return int(text)


def _text(path: Path, value: str | bytes) -> str:
    """Protobuf hands out bytes where a string is not UTF-8."""
    if isinstance(value, bytes):
        raise UnreadableFile(path, f"expected names in UTF-8, found {value!r:.80}")
    return value
