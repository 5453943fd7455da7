"""How things are called in a release: folders, and GGUF files by llama.cpp's naming convention."""

from __future__ import annotations

import gguf.utility

from exporter.formats.gguf.metadata import size_label
from exporter.formats.table import FORMATS
from exporter.release.jobs import Job
from exporter.release.spec import ReleaseSpec


def label(parameters: int) -> str:
    """The size of a model as file names have it: 135M."""
    return size_label(parameters)


def model_folder(spec: ReleaseSpec, model: str) -> str:
    """Where the model lies below the release: at its root, if it is the only one."""
    return "" if len(spec.models) == 1 else model


def model_title(spec: ReleaseSpec, model: str) -> str:
    """What people call the model."""
    return spec.name if len(spec.models) == 1 else f"{spec.name}-{model}"


def artifact_place(spec: ReleaseSpec, job: Job, storage: str, parameters: int) -> str:
    """Where the artifact of ``job`` lies below the release, with slashes. storage: as the target has it."""
    name = job.format
    if FORMATS[job.format].is_file:
        name = f"{job.format}/{gguf_name(spec, job.model, storage, parameters)}"
    folder = model_folder(spec, job.model)
    return f"{folder}/{name}" if folder else name


def gguf_name(spec: ReleaseSpec, model: str, storage: str, parameters: int) -> str:
    """BaseName-SizeLabel-FineTune-Encoding.gguf; a size that the name states already is not said twice.

    Source: docs/gguf.md of ggml, through the gguf package. The version stays out, so that links live on.
    """
    size = label(parameters)
    stated = size.lower() in spec.name.lower().split("-")
    finetune = None if len(spec.models) == 1 else model
    return f"{gguf.utility.naming_convention(spec.name, None, finetune, None, None if stated else size, storage)}.gguf"
