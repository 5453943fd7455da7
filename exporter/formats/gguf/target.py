"""Plan a GGUF from the user's options, and choose whether ttexport or a program of llama.cpp writes the GGUF."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Final

from exporter.errors import NotExpressible
from exporter.families import has_family
from exporter.formats.footprint import peak_nbytes
from exporter.formats.gguf.converter.install import INSTALL, installed_converter
from exporter.formats.gguf.converter.plan import ConverterLayout, plan_converter, write_converted
from exporter.formats.gguf.encoders.projector import plan_projector, projector_nbytes
from exporter.formats.gguf.in_llama_cpp.taught_tokens import taught_token_notes
from exporter.formats.gguf.options import GgufOptions
from exporter.formats.gguf.plan import GgufLayout, plan_gguf
from exporter.formats.gguf.quantisation.file_types import FILE_TYPES, NATIVE_FILE_TYPES, FileType
from exporter.formats.gguf.quantisation.files import plan_quantised, write_quantised
from exporter.formats.gguf.split import Split, split_file
from exporter.formats.gguf.stream import write_gguf
from exporter.formats.target import Scratch, Target
from exporter.io.parallel import Budget
from exporter.merge.plan import MergePlan
from exporter.progress import Progress

#: Memory of the package tokenizers and of the results of the check that compares token ids with llama.cpp's.
_CHECK_BYTES: Final = 30 << 20
#: Names of the makers in the output of ``plan``.
_OWN: Final = "ttexport's writer"
_CONVERTER: Final = "llama.cpp's converter"


def plan_target(options: GgufOptions, merge: MergePlan, budget: Budget) -> Target:
    """Plan a single GGUF. Reads tensor shapes and the tokenizer, but no weights.

    The GGUF of a model with a built-in family is written by ttexport, and the GGUF of any other model by llama.cpp's
    converter. Options for the converter choose the converter for every model.
    Raises NotExpressible if a GGUF cannot represent the model, and BadInput for invalid inputs.
    """
    if options.mmproj:
        return _projector(options, merge, budget)
    file_type = options.file_type
    overridden = options.token_embedding_type or options.output_tensor_type
    quantised = file_type in FILE_TYPES and (file_type not in NATIVE_FILE_TYPES or overridden is not None)
    converter = _converter(options, merge)
    if quantised and file_type:
        settings = _quantised(options, FILE_TYPES[file_type], converter, merge, budget)
    elif converter:
        settings = _converted(options, converter, merge, budget)
    else:
        settings = _native(options, merge, budget)
    settings["notes"] = (*settings.get("notes", ()), *taught_token_notes(merge))
    if split := options.split:
        # The file is split at the end, so the whole file and the parts are on disk together for a moment.
        settings["work_nbytes"] = settings.get("work_nbytes", settings["nbytes"]) + settings["nbytes"]
        settings["finish"] = partial(_split, split)
    peak = peak_nbytes(
        merge,
        budget,
        casts=bool(options.types or options.dtype),
        parses_vocabulary=True,
        library_nbytes=_CHECK_BYTES,
        quantiser=quantised,
        converter=converter is not None,
    )
    maker = _CONVERTER if converter else _OWN
    maker += ", quantised by llama.cpp" if quantised else ""
    return Target(format=options.section, peak_nbytes=peak, maker=maker, **settings)


def _converter(options: GgufOptions, merge: MergePlan) -> Path | None:
    """Return the converter that writes the model, or None if ttexport writes the model itself.

    Raises NotExpressible if the options need a converter and none is installed.
    """
    if options.converter:
        return options.converter
    if options.converter_arguments:
        if script := installed_converter():
            return script
        raise NotExpressible("gguf: --converter-arg", "no converter is installed", instead=f"run {INSTALL}")
    return None if has_family(merge.checkpoint.config, "gguf") else installed_converter()


def _projector(options: GgufOptions, merge: MergePlan, budget: Budget) -> Target:
    """Plan the file with the model's encoders of images and sounds."""
    converter = options.converter or installed_converter()
    if converter is None:
        raise NotExpressible("gguf: --mmproj", "no converter is installed", instead=f"run {INSTALL}")
    stored = _stored(merge)
    ftype = (options.file_type or options.storage or stored).upper()
    layout = plan_projector(merge, converter, ftype, arguments=options.converter_arguments, budget=budget)

    def write(path: Path, progress: Progress, scratch: Scratch) -> None:
        write_converted(layout, path, progress)

    peak = peak_nbytes(merge, budget, casts=True, converter=True)
    nbytes = projector_nbytes(layout.overlay.stored)
    return Target(
        format=options.section,
        storage=ftype,
        nbytes=nbytes,
        work_nbytes=nbytes + layout.overlay.nbytes,
        estimated=True,
        peak_nbytes=peak,
        prefix="mmproj-",
        write=write,
        notes=("the file contains the encoders of images and sounds, for llama.cpp's option --mmproj",),
        maker=_CONVERTER,
    )


def _native(options: GgufOptions, merge: MergePlan, budget: Budget) -> dict[str, Any]:
    # If a dtype is requested, the writer rounds base and rows once; otherwise the writer keeps the stored dtype.
    model = merge.model("F32" if options.storage else None, budget)
    layout = plan_gguf(model, options.file_type or options.storage, pre_tokenizer=options.pre_tokenizer)

    def write(path: Path, progress: Progress, scratch: Scratch) -> None:
        write_gguf(layout, path, progress)

    return {"storage": layout.ftype, "nbytes": layout.nbytes, "write": write, "notes": layout.notes}


def _quantised(
    options: GgufOptions, file_type: FileType, converter: Path | None, merge: MergePlan, budget: Budget
) -> dict[str, Any]:
    source: GgufLayout | ConverterLayout
    if converter:
        source = _converter_layout(options, converter, options.storage or _stored(merge), merge, budget)
    else:
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
        unquantised, was_there = scratch.file(name, lambda place: _write_source(source, place, progress))
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


def _write_source(source: GgufLayout | ConverterLayout, path: Path, progress: Progress) -> None:
    if isinstance(source, ConverterLayout):
        write_converted(source, path, progress)
    else:
        write_gguf(source, path, progress)


def _converted(options: GgufOptions, converter: Path, merge: MergePlan, budget: Budget) -> dict[str, Any]:
    if options.file_type and options.file_type not in NATIVE_FILE_TYPES:
        known = ", ".join((*NATIVE_FILE_TYPES, *FILE_TYPES))
        raise NotExpressible("gguf", f"expected one of the file types {known}, found {options.file_type}")
    stored = merge.checkpoint.tensors[merge.checkpoint.tie.embedding].spec.dtype
    ftype = options.file_type or options.storage or (stored if stored in NATIVE_FILE_TYPES else "F32")
    layout = _converter_layout(options, converter, ftype, merge, budget)

    def write(path: Path, progress: Progress, scratch: Scratch) -> None:
        write_converted(layout, path, progress)

    return {
        "storage": layout.ftype,
        "nbytes": layout.nbytes,
        "work_nbytes": layout.work_nbytes,
        "estimated": True,
        "write": write,
        "notes": layout.notes,
    }


def _converter_layout(
    options: GgufOptions, converter: Path, ftype: str, merge: MergePlan, budget: Budget
) -> ConverterLayout:
    if options.pre_tokenizer:
        reason = "llama.cpp's converter, which writes this model, chooses the pre-tokenizer itself"
        raise NotExpressible("gguf: --pre-tokenizer", reason)
    return plan_converter(
        merge,
        converter,
        ftype,
        storage=options.storage,
        arguments=options.converter_arguments,
        budget=budget,
    )


def _stored(merge: MergePlan) -> str:
    """Return the dtype of the base's matrices, or F32 if they have several dtypes or a dtype that GGUF lacks."""
    dtypes = {tensor.spec.dtype for tensor in merge.checkpoint.tensors.values() if len(tensor.spec.shape) > 1}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= NATIVE_FILE_TYPES.keys() else "F32"


def _split(split: Split, path: Path, progress: Progress) -> None:
    split_file(path, split, progress)
