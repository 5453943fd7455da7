"""An artifact on disk, with its format, and with embedding and head as matrices that are read by rows."""

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
from exporter.sources.gguf.split_files import GgufModel, is_later_split_file
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.onnx.folder import encoder_of, has_model, model_files
from exporter.tensors import DTYPES, FLOATS, Array, ByteRange, cast
from exporter.verify.stored.onnx_blocks import BlockStorage

if TYPE_CHECKING:
    from exporter.sources.onnx.file import OnnxFile

#: Quantisation types that the gguf package supports.
_IN_PYTHON: Final = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"))


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix on disk.

    storage: dtype or quantisation type of the matrix.  raw(start, stop): the stored rows [start, stop), (n, bytes)
    uint8.
    places(row): byte ranges on disk of a row's stored bytes, in order.
    """

    name: str
    storage: str
    n_rows: int
    raw: Callable[[int, int], Array]
    places: Callable[[int], Sequence[ByteRange]]


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk.

    path: the file or folder that a runtime loads.  head: matrix of the head, or None if embedding and head share a
    tensor.
    quantised: True if any tensor is stored in blocks, even if the embedding is not.
    files: ``path`` and all files that ``path`` refers to, for artifacts that can be copied file by file.
    types: types of all tensors of a GGUF.  inputs: input names of an ONNX graph.
    encoder_embedding: embedding of an encoder with a separate file. ``path`` is the decoder in this case.
    gguf: the opened GGUF, kept because parsing a header with one text per token is slow.
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
        """The storage of the embedding, which selects the tolerance."""
        return self.embedding.storage


def find_artifacts(path: Path) -> list[Path]:
    """The artifacts in ``path``.

    The result is ``path`` itself, or the artifacts in its folders hf, gguf, gguf-lora and onnx if ``path`` is the
    output of an export to more than one format.
    """
    formats = [path / name for name in ("hf", "gguf", "gguf-lora", "onnx")]
    if not any(folder.is_dir() for folder in formats) or has_model(path):
        return [path]
    folders = [folder for folder in (path / "hf", path / "onnx") if folder.is_dir()]
    files = [file for folder in formats for file in sorted(folder.glob("*.gguf"))]
    return sorted(folders) + [file for file in files if not is_later_split_file(file)]


def open_artifacts(path: Path) -> list[Artifact]:
    """Detect the format of ``path`` and open the headers. An ONNX folder gives one artifact per model file."""
    format_name = detect(path)
    if format_name == "onnx":
        return [_open_onnx(file) for file in model_files(path)]
    return [_open_gguf(path) if format_name == "gguf" else _open_hf(path)]


def encode(rows: Array, storage: str) -> Array:
    """Encode ``rows`` (n, hidden) in ``storage``. Returns (n, bytes) uint8.

    ONNX Runtime and ggml quantise. Without ggml, the gguf package quantises with its copies of some of ggml's
    quantize_row_*_ref functions. Raises MissingDependency if only ggml supports the type, NotExpressible and BadInput
    as ggml.quantize_rows does.
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
    """Decode ``raw`` (n, bytes) uint8 from ``storage``. Returns (n, hidden) float64."""
    if storage in ("F64", "F32", "F16", "BF16"):
        return np.ascontiguousarray(raw).view(DTYPES[storage]).astype(np.float64)
    if BlockStorage.is_name(storage):
        return BlockStorage.parse(storage).decode(raw)
    import gguf

    values: Array = gguf.quants.dequantize(np.ascontiguousarray(raw), gguf.GGMLQuantizationType[storage])
    return values.astype(np.float64)


def stored_matrix(tensor: FileTensor) -> StoredMatrix:
    """The matrix of a checkpoint tensor, as stored in the file."""

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
        raise BadInput(f"{path}: expected a matrix product that gives the logits, found no such node")
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
