"""What lies on disk: the format of an artifact, and its embedding and head as matrices that are read by rows."""

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

#: What the gguf package can quantise to.
_IN_PYTHON: Final = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"))


@dataclass(frozen=True)
class StoredMatrix:
    """A stored matrix. ``kind`` is its dtype or quantisation; ``raw(start, stop)`` gives rows as (n, bytes) uint8.

    places: where ``raw`` of one row lies on disk, in order.
    """

    name: str
    kind: str
    n_rows: int
    raw: Callable[[int, int], Array]
    places: Callable[[int], Sequence[ByteRange]]


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk. ``head`` is None where the head has no tensor of its own: it shares the embedding's.

    path: what a runtime loads. quantised: some tensor is stored in blocks, though the embedding may not be. types: of
    all tensors, where the format names them. inputs: of a graph.
    files: ``path`` and what it reads besides, for artifacts that can be copied file by file. encoder_embedding: that of
    an encoder which has a file of its own, beside ``path``, which is then the decoder's. parts: an opened GGUF, for
    the checks that follow: its header has a text a token.
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
    parts: GgufModel | None = None

    @property
    def kind(self) -> str:
        """The storage of the embedding: it names the tolerance."""
        return self.embedding.kind


def find_artifacts(path: Path) -> list[Path]:
    """``path`` itself, or what lies in its folders by format if it is the output of several formats."""
    parts = [path / name for name in ("hf", "gguf", "gguf-lora", "onnx")]
    if not any(part.is_dir() for part in parts) or has_model(path):
        return [path]
    found = [part for part in (path / "hf", path / "onnx") if part.is_dir()]
    files = [file for part in parts for file in sorted(part.glob("*.gguf"))]
    return sorted(found) + [file for file in files if not is_later_split_file(file)]


def open_artifacts(path: Path) -> list[Artifact]:
    """Open ``path`` by its format, headers only; an ONNX folder holds one artifact a model file."""
    kind = detect(path)
    if kind == "onnx":
        return [_open_onnx(one) for one in model_files(path)]
    return [_open_gguf(path) if kind == "gguf" else _open_hf(path)]


def encode(rows: Array, kind: str) -> Array:
    """``rows`` (n, hidden) as they are stored in ``kind``: (n, bytes) uint8.

    The quantised forms are ONNX Runtime's and ggml's own; without ggml, the gguf package's, which mirrors some of its
    quantize_row_*_ref.
    """
    if kind in FLOATS:
        return np.ascontiguousarray(cast(rows, kind)).view(np.uint8).reshape(len(rows), -1)
    if BlockStorage.is_name(kind):
        return BlockStorage.parse(kind).encode(rows)
    wide = cast(rows, "F32")
    try:
        return ggml.quantize_rows(wide, kind)
    except MissingDependency:
        if kind not in _IN_PYTHON:
            raise
    import gguf

    quantised: Array = gguf.quants.quantize(wide, gguf.GGMLQuantizationType[kind])
    return quantised.view(np.uint8).reshape(len(rows), -1)


def decode(raw: Array, kind: str) -> Array:
    """The numbers that ``raw`` (n, bytes) uint8 stands for in ``kind``: (n, hidden) float64."""
    if kind in ("F64", "F32", "F16", "BF16"):
        return np.ascontiguousarray(raw).view(DTYPES[kind]).astype(np.float64)
    if BlockStorage.is_name(kind):
        return BlockStorage.parse(kind).decode(raw)
    import gguf

    values: Array = gguf.quants.dequantize(np.ascontiguousarray(raw), gguf.GGMLQuantizationType[kind])
    return values.astype(np.float64)


def stored_matrix(tensor: FileTensor) -> StoredMatrix:
    """A tensor of a checkpoint, as it lies in its file."""

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

    # The tie itself is judged by the checks, so a stale duplicate must not stop the artifact from being opened.
    embedding, head = checkpoint.stored_embedding, checkpoint.stored_head
    return Artifact(path, "hf", matrix(embedding), matrix(head) if head else None)


def _open_gguf(path: Path) -> Artifact:
    parts = GgufModel.open(path)

    def matrix(name: str) -> StoredMatrix:
        file, tensor = parts.holder(name), parts.tensors[name]

        def places(row: int) -> list[ByteRange]:
            return [ByteRange(file.path, tensor.offset_bytes + row * tensor.row_nbytes, tensor.row_nbytes)]

        return StoredMatrix(name, tensor.type, tensor.shape[0], partial(file.rows, name), places)

    if "token_embd.weight" not in parts.tensors:
        raise UnreadableFile(path, "token_embd.weight: expected an input embedding, found none")
    head = matrix("output.weight") if "output.weight" in parts.tensors else None
    types = frozenset(tensor.type for tensor in parts.tensors.values())
    files = [file.path for file in parts.files]
    quantised = not types <= set(FLOATS)
    return Artifact(path, "gguf", matrix("token_embd.weight"), head, quantised, files, types, parts=parts)


def _open_onnx(path: Path) -> Artifact:
    from exporter.sources.onnx.file import OnnxFile  # parses protobuf: only ONNX waits for it

    file = OnnxFile.open(path)
    embedding, head = _onnx_embedding(file), file.head
    if head is None:
        raise BadInput(f"{path}: expected a matrix product that gives the logits, found none")
    beside = encoder_of(path)
    encoder = OnnxFile.open(beside) if beside else None
    opened = [file, encoder] if encoder else [file]
    return Artifact(
        path,
        "onnx",
        embedding,
        None if head == file.embedding else _onnx_matrix(file, head),
        quantised=any(one.quantised for one in opened),
        files=[part for one in opened for part in _onnx_files(one)],
        inputs=file.inputs,
        encoder_embedding=_onnx_embedding(encoder) if encoder else None,
    )


def _onnx_embedding(file: OnnxFile) -> StoredMatrix:
    if file.embedding is None:
        raise BadInput(f"{file.path}: expected a Gather on input_ids, found none")
    return _onnx_matrix(file, file.embedding)


def _onnx_matrix(file: OnnxFile, name: str) -> StoredMatrix:
    tensor = file.initialisers[name]
    kind = str(BlockStorage.of(file, name)) if name in file.blocks else tensor.dtype
    places = partial(file.token_places, name)
    return StoredMatrix(name, kind, tensor.shape[file.token_axis[name]], partial(file.token_bytes, name), places)


def _onnx_files(file: OnnxFile) -> list[Path]:
    return [file.path, *sorted({one.place.path for one in file.initialisers.values() if one.place})]
