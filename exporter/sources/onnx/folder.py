"""Finds the model files of an ONNX folder by the file names that runtimes expect. Opens no file."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from exporter.errors import UnreadableFile

#: Stems of model file names; variants append to a stem. A causal model is one file. An encoder-decoder model is two
#: files, and the decoder file stands for the model in ``model_files``.
_MODEL: Final = "model"
_DECODER: Final = "decoder_model_merged"
_ENCODER: Final = "encoder_model"


def model_files(path: Path) -> list[Path]:
    """Return the model files of a folder, shortest file name first, or ``path`` itself if ``path`` is a file.

    For an encoder-decoder model, the returned list contains the decoder files, and ``encoder_of`` returns the encoder
    file of each decoder file. Raises UnreadableFile if the folder contains no ONNX model file.
    """
    if not path.is_dir():
        return [path]
    if files := _files(path):
        return files
    raise UnreadableFile(
        path, f"expected {_MODEL}*.onnx or {_DECODER}*.onnx in the folder or in its subfolder onnx, found no such file"
    )


def has_model(path: Path) -> bool:
    """Whether the folder ``path``, or its subfolder ``onnx``, contains an ONNX model file."""
    return bool(_files(path))


def encoder_of(model: Path) -> Path | None:
    """Return the encoder file that belongs to a decoder file, or None if the model consists of one file."""
    if not model.name.startswith(_DECODER):
        return None
    return model.with_name(_ENCODER + model.name.removeprefix(_DECODER))


def is_encoder(model: Path) -> bool:
    """Whether the ONNX file ``model`` is the encoder of an encoder-decoder model."""
    return model.name.startswith(_ENCODER)


def _files(path: Path) -> list[Path]:
    for stem in (_MODEL, _DECODER):
        for folder in (path / "onnx", path):
            if files := sorted(folder.glob(f"{stem}*.onnx"), key=lambda file: (len(file.stem), file.stem)):
                return files
    return []
