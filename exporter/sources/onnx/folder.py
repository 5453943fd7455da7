"""Where an ONNX folder keeps its model files: told by their names, as clients look for them. Opens no file."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from exporter.errors import UnreadableFile

#: A causal model is one file; an encoder-decoder is two, called by its decoder here. Variants append to the stems.
_MODEL: Final = "model"
_DECODER: Final = "decoder_model_merged"
_ENCODER: Final = "encoder_model"


def model_files(path: Path) -> list[Path]:
    """The model files of a folder, the plainest name first, or ``path`` itself. Raises UnreadableFile for none.

    Of an encoder-decoder, the decoders; ``encoder_of`` gives what goes with each.
    """
    if not path.is_dir():
        return [path]
    if found := _found(path):
        return found
    expected = f"{_MODEL}.onnx or another {_MODEL}*.onnx, or {_DECODER}.onnx, here or in onnx/"
    raise UnreadableFile(path, f"expected {expected}, found none")


def has_model(path: Path) -> bool:
    """Whether the folder ``path`` holds a model file where clients look for one."""
    return bool(_found(path))


def encoder_of(model: Path) -> Path | None:
    """The encoder beside a decoder; None for a model that is whole by itself."""
    if not model.name.startswith(_DECODER):
        return None
    return model.with_name(_ENCODER + model.name.removeprefix(_DECODER))


def is_encoder(model: Path) -> bool:
    """Whether a model file is the encoder of an encoder-decoder, whose decoders lie beside it."""
    return model.name.startswith(_ENCODER)


def _found(path: Path) -> list[Path]:
    for stem in (_MODEL, _DECODER):
        for folder in (path / "onnx", path):
            if found := sorted(folder.glob(f"{stem}*.onnx"), key=lambda one: (len(one.stem), one.stem)):
                return found
    return []
