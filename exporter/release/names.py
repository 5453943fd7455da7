"""Build the names within a release: names of folders, and names of GGUF files, which follow llama.cpp's convention."""

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
    """Return the folder of the model, as a path below the release.

    The folder name is empty if the release has only one model.
    """
    return "" if len(spec.models) == 1 else model


def model_title(spec: ReleaseSpec, model: str) -> str:
    """Return the model's name for texts: the release's name, plus the model's name if there are two or more models."""
    return spec.name if len(spec.models) == 1 else f"{spec.name}-{model}"


def artifact_place(spec: ReleaseSpec, job: Job, storage: str, parameters: int) -> str:
    """Return the path of the artifact below the release, with slashes. storage: storage of the planned artifact."""
    name, row = job.format, FORMATS[job.format]
    if row.is_file:
        name += f"/{gguf_name(spec, job.model, storage, parameters, adapter_only=row.adapter_only)}"
    folder = model_folder(spec, job.model)
    return f"{folder}/{name}" if folder else name


def gguf_name(spec: ReleaseSpec, model: str, storage: str, parameters: int, *, adapter_only: bool = False) -> str:
    """BaseName-SizeLabel-FineTune-Encoding-Type.gguf.

    The size is omitted from the file name if the model name already contains the size. The file name of an adapter
    contains the type ``LoRA``; file names of models contain no type. The file name contains no version, so that links
    to the file stay valid.

    Source of the naming convention: docs/gguf.md of ggml, through the gguf package.
    """
    size = label(parameters)
    stated = size.lower() in spec.name.lower().split("-")
    finetune = None if len(spec.models) == 1 else model
    size_label = None if stated else size
    model_type: Literal["LoRA"] | None = "LoRA" if adapter_only else None
    return f"{gguf.utility.naming_convention(spec.name, None, finetune, None, size_label, storage, model_type)}.gguf"
