"""Finds the model files of an ONNX folder by the file names that clients expect. Opens no file."""

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
    """The model files of a folder with the shortest name first, or ``path`` itself if ``path`` is a file.

    For an encoder-decoder, the result contains the decoders, and ``encoder_of`` gives the encoder of each decoder.
    Raises UnreadableFile if the folder contains no model file.
    """
    if not path.is_dir():
        return [path]
    if files := _files(path):
        return files
    expected = f"{_MODEL}.onnx or another {_MODEL}*.onnx, or {_DECODER}.onnx, here or in onnx/"
    raise UnreadableFile(path, f"expected {expected}, found no such file")


def has_model(path: Path) -> bool:
    """Whether the folder ``path`` contains a model file in a place where clients look for a model."""
    return bool(_files(path))


def encoder_of(model: Path) -> Path | None:
    """The encoder file beside a decoder file, or None if the model is one file."""
    if not model.name.startswith(_DECODER):
        return None
    return model.with_name(_ENCODER + model.name.removeprefix(_DECODER))


def is_encoder(model: Path) -> bool:
    """Whether the file ``model`` is the encoder of an encoder-decoder model."""
    return model.name.startswith(_ENCODER)


def _files(path: Path) -> list[Path]:
    for stem in (_MODEL, _DECODER):
        for folder in (path / "onnx", path):
            if files := sorted(folder.glob(f"{stem}*.onnx"), key=lambda file: (len(file.stem), file.stem)):
                return files
    return []
