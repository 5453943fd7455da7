"""Names within a release: folders, and GGUF files by llama.cpp's naming convention."""

from __future__ import annotations

from typing import Literal

import gguf.utility

from exporter.formats.gguf.metadata import size_label
from exporter.formats.table import FORMATS
from exporter.release.jobs import Job
from exporter.release.spec import ReleaseSpec


def label(parameters: int) -> str:
    """The number of parameters as file names write it, such as ``135M``."""
    return size_label(parameters)


def model_folder(spec: ReleaseSpec, model: str) -> str:
    """The model's folder below the release; empty, the release itself, if it is the only model."""
    return "" if len(spec.models) == 1 else model


def model_title(spec: ReleaseSpec, model: str) -> str:
    """The model's name for people: the release's, and its own if there are several."""
    return spec.name if len(spec.models) == 1 else f"{spec.name}-{model}"


def artifact_place(spec: ReleaseSpec, job: Job, storage: str, parameters: int) -> str:
    """The artifact's path below the release, with slashes. storage: of the planned target."""
    name, row = job.format, FORMATS[job.format]
    if row.is_file:
        name += f"/{gguf_name(spec, job.model, storage, parameters, adapter_only=row.adapter_only)}"
    folder = model_folder(spec, job.model)
    return f"{folder}/{name}" if folder else name


def gguf_name(spec: ReleaseSpec, model: str, storage: str, parameters: int, *, adapter_only: bool = False) -> str:
    """BaseName-SizeLabel-FineTune-Encoding-Type.gguf, without the size where the name contains it.

    The type is that of an adapter, LoRA; models have none.

    Source: docs/gguf.md of ggml, through the gguf package. Without the version, so that links stay valid.
    """
    size = label(parameters)
    stated = size.lower() in spec.name.lower().split("-")
    finetune = None if len(spec.models) == 1 else model
    size_label = None if stated else size
    model_type: Literal["LoRA"] | None = "LoRA" if adapter_only else None
    return f"{gguf.utility.naming_convention(spec.name, None, finetune, None, size_label, storage, model_type)}.gguf"
