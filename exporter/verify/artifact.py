"""What lies on disk: the format of an artifact, and its embedding and head as matrices that are read by rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from exporter import ggml
from exporter.errors import BadInput, MissingDependency, UnreadableFile, reading
from exporter.sources.checkpoint import Checkpoint
from exporter.sources.gguf_parts import GgufParts, is_later_part
from exporter.sources.gguf_types import MAGIC
from exporter.sources.safetensors import FileTensor
from exporter.tensors import DTYPES, FLOATS, Array, cast

#: What the gguf package can quantise to.
_IN_PYTHON: Final = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"))


@dataclass(frozen=True)
class Matrix:
    """A stored matrix. ``kind`` is its dtype or quantisation; ``raw(start, stop)`` gives rows as (n, bytes) uint8."""

    name: str
    kind: str
    n_rows: int
    raw: Callable[[int, int], Array]


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk. ``head`` is None where the head has no tensor of its own: it shares the embedding's.

    quantised: some tensor is stored in blocks, though the embedding may not be.
    """

    path: Path
    format: str
    embedding: Matrix
    head: Matrix | None
    quantised: bool = False

    @property
    def kind(self) -> str:
        """The storage of the embedding: it names the tolerance."""
        return self.embedding.kind


def detect(path: Path) -> str:
    """The format: hf, gguf or onnx. Raises UnreadableFile for anything else."""
    if path.is_file():
        with reading(path), path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return "gguf"
    if path.is_dir():
        if (path / "onnx" / "model.onnx").is_file() or (path / "model.onnx").is_file():
            return "onnx"
        if (path / "config.json").is_file():
            return "hf"
    found = "nothing" if not path.exists() else "neither"
    raise UnreadableFile(path, f"expected a .gguf file or a folder with a checkpoint or an ONNX model, found {found}")


def find_artifacts(path: Path) -> list[Path]:
    """``path`` itself, or what lies in its folders by format if it is the output of several formats."""
    parts = [path / name for name in ("hf", "gguf", "gguf-lora", "onnx")]
    if not any(part.is_dir() for part in parts) or (path / "onnx" / "model.onnx").is_file():
        return [path]
    found = [part for part in (path / "hf", path / "onnx") if part.is_dir()]
    files = [file for part in parts for file in sorted(part.glob("*.gguf"))]
    return sorted(found) + [file for file in files if not is_later_part(file)]


def open_artifact(path: Path) -> Artifact:
    """Open ``path`` by its format; headers only."""
    return {"hf": _open_hf, "gguf": _open_gguf, "onnx": _open_onnx}[detect(path)](path)


def encode(rows: Array, kind: str) -> Array:
    """``rows`` (n, hidden) as they are stored in ``kind``: (n, bytes) uint8.

    The quantised forms are ggml's own; without it, the gguf package's, which mirrors some of ggml's quantize_row_*_ref.
    """
    if kind in ("F64", "F32", "F16", "BF16"):
        return np.ascontiguousarray(cast(rows, kind)).view(np.uint8).reshape(len(rows), -1)
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
    import gguf

    values: Array = gguf.quants.dequantize(np.ascontiguousarray(raw), gguf.GGMLQuantizationType[kind])
    return values.astype(np.float64)


def stored_matrix(tensor: FileTensor) -> Matrix:
    """A tensor of a checkpoint, as it lies in its file."""

    def raw(start: int, stop: int) -> Array:
        return encode(tensor.rows(start, stop), tensor.spec.dtype)

    return Matrix(tensor.spec.name, tensor.spec.dtype, tensor.spec.n_rows, raw)


def _open_hf(path: Path) -> Artifact:
    checkpoint = Checkpoint.open(path)

    def matrix(name: str) -> Matrix:
        return stored_matrix(checkpoint.tensors[name])

    # The tie itself is judged by the checks, so a stale duplicate must not stop the artifact from being opened.
    embedding, head = checkpoint.stored_embedding, checkpoint.stored_head
    return Artifact(path, "hf", matrix(embedding), matrix(head) if head else None)


def _open_gguf(path: Path) -> Artifact:
    parts = GgufParts.open(path)

    def matrix(name: str) -> Matrix:
        file, tensor = parts.holder(name), parts.tensors[name]
        return Matrix(name, tensor.type, tensor.shape[0], lambda start, stop: file.rows(name, start, stop))

    if "token_embd.weight" not in parts.tensors:
        raise UnreadableFile(path, "token_embd.weight: expected an input embedding, found none")
    head = matrix("output.weight") if "output.weight" in parts.tensors else None
    quantised = any(tensor.type not in FLOATS for tensor in parts.tensors.values())
    return Artifact(path, "gguf", matrix("token_embd.weight"), head, quantised)


def _open_onnx(path: Path) -> Artifact:
    from exporter.sources.onnx import OnnxFile  # parses protobuf: only ONNX waits for it

    file = OnnxFile.open(path)

    def matrix(name: str) -> Matrix:
        tensor = file.initialisers[name]

        def raw(start: int, stop: int) -> Array:
            return encode(file.token_rows(name, start, stop), tensor.dtype)

        return Matrix(name, tensor.dtype, tensor.shape[file.token_axis[name]], raw)

    if file.embedding is None or file.head is None:
        missing = "a Gather on input_ids" if file.embedding is None else "a matrix product that gives the logits"
        raise BadInput(f"{path}: expected {missing}, found none")
    return Artifact(path, "onnx", matrix(file.embedding), None if file.head == file.embedding else matrix(file.head))
