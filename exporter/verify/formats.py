"""Define where an export stores each artifact format, and how artifacts that contain only an adapter are verified."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.sources.gguf.split_files import is_later_split_file
from exporter.sources.onnx.folder import has_model
from exporter.verify.expect.reference import Reference
from exporter.verify.gguf.lora import is_lora, verify_lora
from exporter.verify.gguf.projector import is_projector, verify_projector
from exporter.verify.report import Report

#: Verifies the artifact at a path at a level; the last argument is called with each progress message.
Verifier = Callable[[Path, Reference, str, Callable[[str], None]], Report]


@dataclass(frozen=True, slots=True)
class ArtifactFormat:
    """An artifact format, with the functions for locating and verifying artifacts of the format.

    is_file: whether an artifact of the format is a GGUF file rather than a folder. is_adapter: for a format that
    contains only the adapter, a function that returns True for the path of an artifact in the format. verifier: for a
    format that contains only the adapter, the function that verifies an artifact. For formats that contain the whole
    model, ``is_adapter`` and ``verifier`` are None, and ``exporter.verify.run`` verifies the artifacts.
    """

    is_file: bool = False
    is_adapter: Callable[[Path], bool] | None = None
    verifier: Verifier | None = None


#: The name of a format, which is also its folder in the output of an export to several formats.
FORMATS: Final[Mapping[str, ArtifactFormat]] = {
    "hf": ArtifactFormat(),
    "onnx": ArtifactFormat(),
    "gguf": ArtifactFormat(is_file=True),
    "gguf-lora": ArtifactFormat(is_file=True, is_adapter=is_lora, verifier=verify_lora),
    "mmproj": ArtifactFormat(is_file=True, is_adapter=is_projector, verifier=verify_projector),
}


def adapter_format(path: Path) -> str | None:
    """Return the format of an artifact that contains only the adapter, or None if ``path`` contains a whole model."""
    return next((name for name, row in FORMATS.items() if row.is_adapter and row.is_adapter(path)), None)


def find_artifacts(path: Path) -> list[Path]:
    """Return the paths of all artifacts in ``path``.

    If ``path`` is the output folder of an export to several formats, the artifacts are in subfolders named after the
    formats. If ``path`` is a single artifact, the result contains only ``path``.
    """
    folders = {name: path / name for name in FORMATS if (path / name).is_dir()}
    if not folders or has_model(path):
        return [path]
    paths = [folder for name, folder in folders.items() if not FORMATS[name].is_file]
    files = [
        file for name, folder in folders.items() if FORMATS[name].is_file for file in sorted(folder.glob("*.gguf"))
    ]
    return paths + [file for file in files if not is_later_split_file(file)]
