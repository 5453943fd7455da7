"""Plan a GGUF from the user's options, and choose whether ttexport or a program of llama.cpp writes the GGUF."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from exporter.formats.footprint import peak_nbytes
from exporter.formats.gguf.converter.plan import plan_converter, write_converted
from exporter.formats.gguf.options import GgufOptions
from exporter.formats.gguf.plan import plan_gguf
from exporter.formats.gguf.quantisation.file_types import FILE_TYPES, NATIVE_FILE_TYPES, FileType
from exporter.formats.gguf.quantisation.files import plan_quantised, write_quantised
from exporter.formats.gguf.split import Split, split_file
from exporter.formats.gguf.stream import write_gguf
from exporter.formats.target import Scratch, Target
from exporter.io.parallel import Budget
from exporter.merge.plan import MergePlan
from exporter.progress import Progress


def plan_target(options: GgufOptions, merge: MergePlan, budget: Budget) -> Target:
    """Plan a single GGUF. The function reads tensor shapes and the tokenizer, but no weights.

    Raises NotExpressible if a GGUF cannot represent the model, and BadInput for invalid inputs.
    """
    file_type = options.file_type
    overridden = options.token_embedding_type or options.output_tensor_type
    if options.converter:
        settings = _converted(options, options.converter, merge, budget)
    elif file_type in FILE_TYPES and (file_type not in NATIVE_FILE_TYPES or overridden):
        settings = _quantised(options, FILE_TYPES[file_type], merge, budget)
    else:
        settings = _native(options, merge, budget)
    if split := options.split:
        # The file is split at the end, so the whole file and the parts are on disk together for a moment.
        settings["work_nbytes"] = settings.get("work_nbytes", settings["nbytes"]) + settings["nbytes"]
        settings["finish"] = partial(_split, split)
    peak = peak_nbytes(
        merge,
        budget,
        casts=bool(options.types or options.dtype),
        parses_vocabulary=True,
        quantiser=settings.get("estimated", False),
    )
    return Target(format=options.section, peak_nbytes=peak, **settings)


def _native(options: GgufOptions, merge: MergePlan, budget: Budget) -> dict[str, Any]:
    # If a dtype is requested, the writer rounds base and rows once; otherwise the writer keeps the stored dtype.
    model = merge.model("F32" if options.storage else None, budget)
    layout = plan_gguf(model, options.file_type or options.storage, pre_tokenizer=options.pre_tokenizer)

    def write(path: Path, progress: Progress, scratch: Scratch) -> None:
        write_gguf(layout, path, progress)

    return {"storage": layout.ftype, "nbytes": layout.nbytes, "write": write, "notes": layout.notes}


def _quantised(options: GgufOptions, file_type: FileType, merge: MergePlan, budget: Budget) -> dict[str, Any]:
    source = plan_gguf(
        merge.model("F32" if options.storage else None, budget),
        options.storage,
        pre_tokenizer=options.pre_tokenizer,
        mixed="F32",
    )
    layout = plan_quantised(
        source,
        file_type,
        imatrix=options.imatrix,
        token_embedding_type=options.token_embedding_type,
        output_tensor_type=options.output_tensor_type,
    )

    def write(path: Path, progress: Progress, scratch: Scratch) -> None:
        name = f"unquantised-{source.ftype}.gguf"
        unquantised, was_there = scratch.file(name, lambda place: write_gguf(source, place, progress))
        if was_there:
            progress(source.nbytes)
        write_quantised(layout, unquantised, path, progress)

    return {
        "storage": file_type.name,
        "nbytes": layout.nbytes,
        "work_nbytes": layout.work_nbytes,
        "estimated": True,
        "write": write,
        "notes": (*source.notes, *layout.notes),
    }


def _converted(options: GgufOptions, script: Path, merge: MergePlan, budget: Budget) -> dict[str, Any]:
    model = merge.model("F32" if options.storage else None, budget)
    layout = plan_converter(model, script, options.file_type or options.storage)

    def write(path: Path, progress: Progress, scratch: Scratch) -> None:
        write_converted(layout, path, progress)

    return {"storage": layout.ftype, "nbytes": layout.nbytes, "write": write, "maker": "llama.cpp's converter"}


def _split(split: Split, path: Path, progress: Progress) -> None:
    split_file(path, split, progress)
