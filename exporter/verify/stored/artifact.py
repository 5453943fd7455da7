"""Detect the format of an artifact on disk, and read rows of the artifact's embedding and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from exporter import ggml
from exporter.errors import BadInput, MissingDependency, UnreadableFile
from exporter.sources.detect import detect
from exporter.sources.gguf.split_files import GgufModel
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.onnx.folder import encoder_of, model_files
from exporter.tensors import DTYPES, FLOATS, Array, ByteRange, cast
from exporter.verify.stored.onnx_blocks import BlockStorage

if TYPE_CHECKING:
    from exporter.sources.onnx.file import OnnxFile

#: Quantisation types that the gguf package supports.
_IN_PYTHON: Final = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"))


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix in a file on disk.

    storage: the dtype or quantisation type in which the matrix is stored.
    raw: a function (start, stop) that returns the stored bytes of the rows [start, stop) as a uint8 array of shape (n,
    bytes).
    places: a function (row) that returns, in order, the byte ranges of the files that store the row.
    """

    name: str
    storage: str
    n_rows: int
    raw: Callable[[int, int], Array]
    places: Callable[[int], Sequence[ByteRange]]


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk.

    path: the file or folder that a runtime loads. For an encoder-decoder in ONNX, ``path`` is the decoder's file. head:
    the matrix of the output head, or None if embedding and head are the same tensor. quantised: True if any tensor of
    the artifact is quantised in blocks, even if the embedding is not quantised. files: for GGUF and ONNX, all files
    that belong to the artifact, including ``path``. types: for GGUF, the types of all tensors. inputs: for ONNX, the
    input names of the graph. encoder_embedding: the embedding of the encoder, if the encoder has a separate ONNX file.
    gguf: the opened GGUF, kept in memory because its header contains one text per token and is slow to parse.
    """

    path: Path
    format: str
    embedding: StoredMatrix
    head: StoredMatrix | None
    quantised: bool = False
    files: Sequence[Path] = ()
    types: frozenset[str] = frozenset()
    inputs: tuple[str, ...] = ()
    encoder_embedding: StoredMatrix | None = None
    gguf: GgufModel | None = None

    @property
    def storage(self) -> str:
        """The dtype or quantisation type of the embedding, which determines the tolerances of checks."""
        return self.embedding.storage


def open_artifacts(path: Path) -> list[Artifact]:
    """Detect the format of ``path``, and open the artifacts in ``path`` without reading their weights.

    The returned list contains one artifact per model file for an ONNX folder, and one artifact for any other format.
    """
    format_name = detect(path)
    if format_name == "onnx":
        return [_open_onnx(file) for file in model_files(path)]
    return [_open_gguf(path) if format_name == "gguf" else _open_hf(path)]


def encode(rows: Array, storage: str) -> Array:
    """Convert ``rows`` of shape (n, hidden) to the dtype or quantisation type ``storage``; returns (n, bytes) uint8.

    ONNX Runtime quantises rows to ONNX block types, and ggml quantises rows to GGUF types. If ggml is not installed,
    the gguf package is used for the types that the package supports. The gguf package contains ports of ggml's
    quantize_row_*_ref functions.

    Raises MissingDependency if only ggml supports the type and ggml is not installed. The errors NotExpressible and
    BadInput that ggml.quantize_rows raises are passed on.
    """
    if storage in FLOATS:
        return np.ascontiguousarray(cast(rows, storage)).view(np.uint8).reshape(len(rows), -1)
    if BlockStorage.is_name(storage):
        return BlockStorage.parse(storage).encode(rows)
    wide = cast(rows, "F32")
    try:
        return ggml.quantize_rows(wide, storage)
    except MissingDependency:
        if storage not in _IN_PYTHON:
            raise
    import gguf

    quantised: Array = gguf.quants.quantize(wide, gguf.GGMLQuantizationType[storage])
    return quantised.view(np.uint8).reshape(len(rows), -1)


def decode(raw: Array, storage: str) -> Array:
    """Convert stored bytes (n, bytes) from the dtype or quantisation type ``storage`` to float64 (n, hidden)."""
    if storage in ("F64", "F32", "F16", "BF16"):
        return np.ascontiguousarray(raw).view(DTYPES[storage]).astype(np.float64)
    if BlockStorage.is_name(storage):
        return BlockStorage.parse(storage).decode(raw)
    import gguf

    values: Array = gguf.quants.dequantize(np.ascontiguousarray(raw), gguf.GGMLQuantizationType[storage])
    return values.astype(np.float64)


def stored_matrix(tensor: FileTensor) -> StoredMatrix:
    """Return a checkpoint tensor as a StoredMatrix whose rows are read from the tensor's file."""

    def raw(start: int, stop: int) -> Array:
        return encode(tensor.rows(start, stop), tensor.spec.dtype)

    def places(row: int) -> list[ByteRange]:
        width = tensor.spec.row_nbytes
        return [ByteRange(tensor.place.path, tensor.place.offset_bytes + row * width, width)]

    return StoredMatrix(tensor.spec.name, tensor.spec.dtype, tensor.spec.n_rows, raw, places)


def _open_hf(path: Path) -> Artifact:
    checkpoint = Checkpoint.open(path)

    def matrix(name: str) -> StoredMatrix:
        return stored_matrix(checkpoint.tensors[name])

    # A check compares the tie, so an artifact with a stale duplicate of the head must open without an error.
    embedding, head = checkpoint.stored_embedding, checkpoint.stored_head
    return Artifact(path, "hf", matrix(embedding), matrix(head) if head else None)


def _open_gguf(path: Path) -> Artifact:
    gguf = GgufModel.open(path)

    def matrix(name: str) -> StoredMatrix:
        file, tensor = gguf.holder(name), gguf.tensors[name]

        def places(row: int) -> list[ByteRange]:
            return [ByteRange(file.path, tensor.offset_bytes + row * tensor.row_nbytes, tensor.row_nbytes)]

        return StoredMatrix(name, tensor.type, tensor.shape[0], partial(file.rows, name), places)

    if "token_embd.weight" not in gguf.tensors:
        raise UnreadableFile(path, "token_embd.weight: expected an input embedding, found no such tensor")
    head = matrix("output.weight") if "output.weight" in gguf.tensors else None
    types = frozenset(tensor.type for tensor in gguf.tensors.values())
    files = [file.path for file in gguf.files]
    quantised = not types <= set(FLOATS)
    return Artifact(path, "gguf", matrix("token_embd.weight"), head, quantised, files, types, gguf=gguf)


def _open_onnx(path: Path) -> Artifact:
    from exporter.sources.onnx.file import OnnxFile  # loads protobuf, which only ONNX needs

    file = OnnxFile.open(path)
    embedding, head = _onnx_embedding(file), file.head
    if head is None:
        raise BadInput(f"{path}: expected a matrix product that computes the logits, found no such node")
    encoder_path = encoder_of(path)
    encoder = OnnxFile.open(encoder_path) if encoder_path else None
    opened = [file, encoder] if encoder else [file]
    return Artifact(
        path,
        "onnx",
        embedding,
        None if head == file.embedding else _onnx_matrix(file, head),
        quantised=any(model.quantised for model in opened),
        files=[part for model in opened for part in _onnx_files(model)],
        inputs=file.inputs,
        encoder_embedding=_onnx_embedding(encoder) if encoder else None,
    )


def _onnx_embedding(file: OnnxFile) -> StoredMatrix:
    if file.embedding is None:
        raise BadInput(f"{file.path}: expected a Gather node on input_ids, found no such node")
    return _onnx_matrix(file, file.embedding)


def _onnx_matrix(file: OnnxFile, name: str) -> StoredMatrix:
    tensor = file.initialisers[name]
    storage = str(BlockStorage.of(file, name)) if name in file.blocks else tensor.dtype
    places = partial(file.token_places, name)
    return StoredMatrix(name, storage, tensor.shape[file.token_axis[name]], partial(file.token_bytes, name), places)


def _onnx_files(file: OnnxFile) -> list[Path]:
    return [file.path, *sorted({tensor.place.path for tensor in file.initialisers.values() if tensor.place})]
