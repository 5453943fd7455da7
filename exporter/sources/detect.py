"""Detects the model format of a file or folder: hf, gguf or onnx."""

from __future__ import annotations

from pathlib import Path

from exporter.errors import UnreadableFile, reading
from exporter.sources.gguf.types import MAGIC
from exporter.sources.journal import refuse_interrupted
from exporter.sources.onnx.folder import has_model


def detect(path: Path) -> str:
    """Return the model format of the file or folder ``path``: hf, gguf or onnx.

    Raises UnreadableFile if the format is unknown, or if an in-place patch of the model was interrupted.
    """
    if path.is_file():
        with reading(path), path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return "gguf"
        if path.suffix == ".onnx":
            return _onnx(path)
    if path.is_dir():
        if has_model(path):
            return _onnx(path)
        if (path / "config.json").is_file():
            return "hf"
    actual = "no such file or folder" if not path.exists() else "a file or folder in another format"
    raise UnreadableFile(path, f"expected a .gguf file or a folder with a checkpoint or an ONNX model, found {actual}")


def _onnx(path: Path) -> str:
    """Raise UnreadableFile if an in-place patch of the model was interrupted.

    An interrupted patch leaves a journal file. The function searches for a journal next to ``path``, next to the parent
    folder of ``path``, and next to the parent of that folder.
    """
    absolute = path.absolute()
    for folder in (absolute, absolute.parent, absolute.parent.parent):
        refuse_interrupted(folder)
    return "onnx"
