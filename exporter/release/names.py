"""Build the names of the folders and of the GGUF files in a release. GGUF file names follow llama.cpp's convention."""

from __future__ import annotations

from typing import Literal

import gguf.utility

from exporter.formats.gguf.metadata import size_label
from exporter.formats.table import FORMATS
from exporter.release.jobs import Job
from exporter.release.spec import ReleaseSpec


def label(parameters: int) -> str:
    """Return the number of parameters as written in file names, such as ``135M``."""
    return size_label(parameters)


def model_folder(spec: ReleaseSpec, model: str) -> str:
    """Return the path of a model's folder, relative to the release folder.

    The path is empty if the release has only one model, because its artifacts are then in the release folder itself.
    """
    return "" if len(spec.models) == 1 else model


def model_title(spec: ReleaseSpec, model: str) -> str:
    """Return the title of a model: the name of the release, plus the key of the model if the release has several."""
    return spec.name if len(spec.models) == 1 else f"{spec.name}-{model}"


def artifact_place(spec: ReleaseSpec, job: Job, storage: str, parameters: int) -> str:
    """Return the path of an artifact relative to the release folder, with slashes.

    storage: dtype or quantisation type of the artifact.
    """
    name, row = job.format, FORMATS[job.format]
    if row.is_file:
        name += f"/{gguf_name(spec, job.model, storage, parameters, adapter_only=row.adapter_only)}"
    folder = model_folder(spec, job.model)
    return f"{folder}/{name}" if folder else name


def gguf_name(spec: ReleaseSpec, model: str, storage: str, parameters: int, *, adapter_only: bool = False) -> str:
    """BaseName-SizeLabel-FineTune-Encoding-Type.gguf.

    The label of the model size, such as ``135M``, is omitted if the name of the release already contains it. The file
    name of an adapter contains the type ``LoRA``; file names of models contain no type. The file name contains no
    version, so that links to the file stay valid when a new version is released.

    The naming convention is documented in ggml's docs/gguf.md and implemented by the package gguf.
    """
    size = label(parameters)
    stated = size.lower() in spec.name.lower().split("-")
    finetune = None if len(spec.models) == 1 else model
    size_label = None if stated else size
    model_type: Literal["LoRA"] | None = "LoRA" if adapter_only else None
    return f"{gguf.utility.naming_convention(spec.name, None, finetune, None, size_label, storage, model_type)}.gguf"
