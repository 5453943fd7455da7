"""Finds the model files of an ONNX folder by the names that clients expect. Opens no file."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from exporter.errors import UnreadableFile

#: A causal model is one file; an encoder-decoder is two, and its decoder stands for it here. Variants append to these
#: stems.
_MODEL: Final = "model"
_DECODER: Final = "decoder_model_merged"
_ENCODER: Final = "encoder_model"


def model_files(path: Path) -> list[Path]:
    """The model files of a folder, the shortest name first, or ``path`` itself. Raises UnreadableFile for none.

    For an encoder-decoder, the decoders; ``encoder_of`` gives the encoder of each.
    """
    if not path.is_dir():
        return [path]
    if files := _files(path):
        return files
    expected = f"{_MODEL}.onnx or another {_MODEL}*.onnx, or {_DECODER}.onnx, here or in onnx/"
    raise UnreadableFile(path, f"expected {expected}, found none")


def has_model(path: Path) -> bool:
    """Whether the folder ``path`` has a model file where clients look for it."""
    return bool(_files(path))


def encoder_of(model: Path) -> Path | None:
    """The encoder beside a decoder; None for a model of one file."""
    if not model.name.startswith(_DECODER):
        return None
    return model.with_name(_ENCODER + model.name.removeprefix(_DECODER))


def is_encoder(model: Path) -> bool:
    """Whether a model file is the encoder of an encoder-decoder."""
    return model.name.startswith(_ENCODER)


def _files(path: Path) -> list[Path]:
    for stem in (_MODEL, _DECODER):
        for folder in (path / "onnx", path):
            if files := sorted(folder.glob(f"{stem}*.onnx"), key=lambda file: (len(file.stem), file.stem)):
                return files
    return []
