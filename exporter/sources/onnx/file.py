"""Reads ONNX model files: locates the bytes of every initialiser, and finds the embedding and the head.

Opening a model reads the graph, and does not read weights that are stored as external data. Models of all export tools
are accepted. Source: onnx.proto3.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no stubs
from onnx import TensorProto, numpy_helper

from exporter.errors import NotExpressible, UnreadableFile, reading
from exporter.io.files import opened, read_exactly
from exporter.sources.hf.safetensors import read_into
from exporter.sources.onnx.folder import model_files
from exporter.sources.onnx.graph import BlockForm, ScaledForm, find_vocabulary
from exporter.sources.onnx.scan import check_cost
from exporter.sources.onnx.tensors import TensorRange, tensor_ranges, text
from exporter.tensors import DTYPES, Array, ByteRange

#: Maximum size of a protobuf message.
_MAX_MODEL_BYTES: Final = 2 << 30


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX model file and its external data.

    path: path of the model file. inputs, outputs: names of the graph's inputs and outputs in the order of the graph,
    without initialisers. metadata: the metadata_props of the model. embedding: name of the initialiser that a Gather on
    input_ids reads, or None if the graph has no embedding. head: name of the initialiser in the matrix product that
    computes the logits, or None if the graph has no head. token_axis: maps the names of embedding and head to the axis
    of the tokens: 0 for shape (tokens, hidden), and 1 for shape (hidden, tokens). blocks: maps the names of embedding
    and head, if block-quantised, to their formats. scaled: maps the names of embedding and head, if quantised with one
    scale and one zero point, to their formats. quantised: whether the graph contains a matrix product of integers.
    block_formats: the block formats of all matrices of the graph, such as "int4 x 32 with zero points".
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
    scaled: Mapping[str, ScaledForm]
    quantised: bool
    block_formats: tuple[str, ...]
    _inline: Mapping[str, TensorProto] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> OnnxFile:
        """Open the model file ``path``, or the first of the ``model_files`` if ``path`` is a folder.

        Raises UnreadableFile, naming the initialiser, if the file is not an ONNX model; if an element type is unknown;
        if external data is outside the folder, missing, too short, or not a regular file; or if the length of the data
        contradicts the shape.
        """
        path = model_files(path)[0]
        model = _parse(path)
        graph = model.graph
        initialisers = tensor_ranges(path, graph.initializer)
        vocabulary = find_vocabulary(graph, {name: len(tensor.shape) for name, tensor in initialisers.items()})
        embedding, head = vocabulary.embedding, vocabulary.head
        matrices = [matrix for matrix in (head, embedding) if matrix]
        return cls(
            path=path,
            initialisers=initialisers,
            inputs=tuple(text(path, value.name) for value in graph.input if value.name not in initialisers),
            outputs=tuple(text(path, value.name) for value in graph.output),
            metadata={text(path, prop.key): text(path, prop.value) for prop in model.metadata_props},
            embedding=embedding.name if embedding else None,
            head=head.name if head else None,
            token_axis={matrix.name: matrix.token_axis for matrix in matrices},
            blocks={matrix.name: matrix.blocks for matrix in matrices if matrix.blocks},
            scaled={matrix.name: matrix.scaled for matrix in matrices if matrix.scaled},
            quantised=vocabulary.quantised,
            block_formats=vocabulary.block_formats,
            _inline={tensor.name: tensor for tensor in graph.initializer if initialisers[tensor.name].place is None},
        )

    def parse(self) -> onnx.ModelProto:
        """Parse the whole model file into a new protobuf message. The caller may modify the returned protobuf message.

        Peak memory: twice the size of the model file.
        """
        return _parse(self.path)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Return the rows [start, stop) of an initialiser along its first axis; a scalar has one row.

        Peak memory: the returned rows. Raises NotExpressible if numpy lacks the element type of the initialiser. Raises
        UnreadableFile if data of the initialiser is missing.
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
        """Return the rows of the embedding or head for the tokens [start, stop), as an array (stop - start, hidden).

        Each row of the returned array is the row of one token, even if the matrix is stored as (hidden, tokens). Peak
        memory: the returned rows and, for a matrix with the shape (hidden, tokens), the accessed pages of the file.
        Raises the same errors as ``OnnxFile.rows``.
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
        except ValueError as exc:  # an empty matrix, or a file that was cut short
            raise UnreadableFile(place.path, f"{name}: {exc}") from exc
        return np.ascontiguousarray(mapped[:, start:stop].T)

    def stored_tensors(self, name: str) -> list[TensorRange]:
        """Return the initialisers that together store the matrix ``name``. Every initialiser has one row per token.

        An unquantised matrix is stored in one initialiser. A quantised matrix is stored in separate initialisers for
        codes, scales and zero points.
        """
        form = self.blocks.get(name)
        names = [name, form.scales, form.zero_points] if form else [name]
        return [self.initialisers[stored] for stored in names if stored is not None]

    def tokens(self, name: str) -> int:
        """Return the number of tokens of the embedding or the head."""
        return self.initialisers[name].shape[self.token_axis[name]]

    def token_bytes(self, name: str, start: int, stop: int) -> Array:
        """Return the stored bytes of the tokens [start, stop) as a uint8 array (stop - start, bytes per token).

        The bytes of a token are the token's rows in all ``stored_tensors``, joined.
        """
        if self.token_axis[name]:
            rows = self.token_rows(name, start, stop)
            return rows.view(np.uint8).reshape(len(rows), -1)
        stored = []
        for tensor in self.stored_tensors(name):
            width = tensor.nbytes // self.tokens(name)
            if tensor.place is None:
                whole = np.frombuffer(self._inline[tensor.name].raw_data, np.uint8).reshape(-1, width)
                stored.append(whole[start:stop])
            else:
                stored.append(np.empty((stop - start, width), np.uint8))
                read_into(tensor.place.path, tensor.place.offset_bytes + start * width, stored[-1])
        return np.concatenate(stored, axis=1)

    def token_places(self, name: str, token_id: int) -> list[ByteRange]:
        """Return the byte ranges of files that store the token ``token_id``, one range for each stored tensor.

        Raises NotExpressible if a row of the token is not a contiguous byte range of a file.
        """
        places = []
        for tensor in self.stored_tensors(name):
            place = tensor.place
            if place is None or self.token_axis[name]:
                raise NotExpressible(
                    f"{self.path}: {tensor.name}",
                    "the rows of this tensor are not byte ranges of an external data file",
                )
            width = tensor.nbytes // self.tokens(name)
            places.append(ByteRange(place.path, place.offset_bytes + token_id * width, width))
        return places

    def inline_bytes(self, name: str) -> bytes:
        """Return the bytes of an initialiser that is stored inside the model file."""
        tensor = self._inline[name]
        return bytes(tensor.raw_data) if tensor.HasField("raw_data") else numpy_helper.to_array(tensor).tobytes()

    def raw(self, name: str, start: int, stop: int) -> Array:
        """Return the bytes [start, stop) of an initialiser as a uint8 array.

        Raises NotExpressible if the initialiser is stored inside the model file, but not as raw_data.
        """
        tensor = self.initialisers[name]
        if tensor.place is not None:
            out = np.empty(stop - start, np.uint8)
            read_into(tensor.place.path, tensor.place.offset_bytes + start, out)
            return out
        inline = self._inline[name]
        if not inline.HasField("raw_data") and tensor.nbytes:
            raise NotExpressible(
                f"{self.path}: {name}", "the tensor is stored as single values in the model file, not as raw_data"
            )
        return np.frombuffer(inline.raw_data, np.uint8)[start:stop]

    def _inline_value(self, tensor: TensorRange) -> Array:
        dtype = self._dtype(tensor)
        value: Array = numpy_helper.to_array(self._inline[tensor.name])
        return value.view(dtype) if value.dtype.itemsize == dtype.itemsize else value.astype(dtype)

    def _dtype(self, tensor: TensorRange) -> np.dtype[Any]:
        if tensor.dtype not in DTYPES:
            reason = f"this version of ttexport cannot read values of dtype {tensor.dtype}"
            raise NotExpressible(f"{self.path}: {tensor.name}", reason)
        return DTYPES[tensor.dtype]


def _parse(path: Path) -> onnx.ModelProto:
    with opened(path) as (file, size):
        if size > _MAX_MODEL_BYTES:
            raise UnreadableFile(path, f"expected an ONNX file of at most {_MAX_MODEL_BYTES} bytes, found {size} bytes")
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
        raise UnreadableFile(path, "expected an ONNX model, found a model without a graph")
    return model
