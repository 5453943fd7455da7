"""Plan and write GGUFs with llama.cpp's converter, which reads an overlay of the merged checkpoint.

The GGUF that the converter writes is verified like every other GGUF, so the converter need not be trusted.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import UnreadableFile, writing
from exporter.formats.gguf.converter.location import script_of
from exporter.formats.gguf.converter.needs import required_arguments
from exporter.formats.gguf.converter.overlay import Overlay, plan_overlay, write_overlay
from exporter.formats.gguf.converter.run import Conversion, run_converter
from exporter.formats.gguf.converter.scope import refuse_unverifiable
from exporter.formats.gguf.converter.source import text_architecture
from exporter.formats.gguf.converter.upstream import refuse_faults
from exporter.formats.gguf.in_llama_cpp.general_name import GeneralName, general_name
from exporter.formats.gguf.quantisation.tensor_types import fits
from exporter.formats.gguf.writer import TensorEntry
from exporter.io.parallel import Budget
from exporter.io.staging import sync_file
from exporter.merge.plan import MergePlan
from exporter.progress import Progress, silent


@dataclass(frozen=True)
class ConverterLayout:
    """The plan of a GGUF that llama.cpp's converter makes from ``overlay``. The sizes are estimates.

    ftype: the file type of the GGUF. chosen: the options of the converter that ttexport chose. name: the model's name.
    """

    overlay: Overlay
    conversion: Conversion
    chosen: tuple[str, ...]
    name: GeneralName

    @property
    def ftype(self) -> str:
        """The file type of the GGUF."""
        return self.conversion.ftype

    @property
    def entries(self) -> Sequence[TensorEntry]:
        """The tensors of the GGUF, with llama.cpp's names for embedding and head, and otherwise with stored names."""
        tie = self.overlay.stored.tie
        names = {tie.embedding: "token_embd.weight", tie.head: "output.weight"}
        return [
            TensorEntry(names.get(name, name), self._type(spec.shape), spec.shape)
            for name, spec in self.overlay.stored.specs.items()
        ]

    @property
    def header_nbytes(self) -> int:
        """Estimated size in bytes of the GGUF's metadata, which is mostly the vocabulary."""
        tokenizer = self.overlay.stored.files.get("tokenizer.json")
        return tokenizer.stat().st_size if tokenizer else 0

    @property
    def nbytes(self) -> int:
        """Estimated size of the GGUF in bytes."""
        return self.header_nbytes + sum(entry.nbytes for entry in self.entries)

    @property
    def work_nbytes(self) -> int:
        """Estimated number of bytes written: the GGUF, and the changed tensors of the overlay."""
        return self.nbytes + self.overlay.nbytes

    @property
    def notes(self) -> tuple[str, ...]:
        """Say which options of the converter were chosen for the model."""
        return tuple(f"llama.cpp's converter runs with {option}, as the tensors need it" for option in self.chosen)

    def _type(self, shape: Sequence[int]) -> str:
        if len(shape) < 2:
            return "F32"
        return self.ftype if fits(self.ftype, shape[-1]) else "F16"


def plan_converter(
    merge: MergePlan,
    converter: Path,
    ftype: str,
    *,
    storage: str | None = None,
    arguments: Sequence[str] = (),
    budget: Budget | None = None,
) -> ConverterLayout:
    """Plan the GGUF of the file type ``ftype`` (F32, F16, BF16 or Q8_0). Reads tensor shapes only, no weights.

    converter: llama.cpp's script, or a folder with the script. storage: the dtype that the user requested, or None to
    keep the base's dtype; if given, trained values are rounded once, by the converter. arguments: options that the user
    passes to the script.
    Raises UnreadableFile if the script does not exist, and the errors of ``required_arguments`` and ``general_name``.
    """
    script = script_of(converter)
    if not script.is_file():
        raise UnreadableFile(script, "expected llama.cpp's convert_hf_to_gguf.py, but the file does not exist")
    script = script.resolve()
    stored = merge.model(None, budget)
    refuse_unverifiable(stored.config, str(stored.path))
    refuse_faults(stored.config, {name: spec.shape for name, spec in stored.specs.items()}, str(stored.path))
    chosen = required_arguments(script, stored, arguments)
    overlay = plan_overlay(stored, merge.model("F32", budget) if storage else stored)
    architecture = text_architecture(stored.config) or "this model"
    name = general_name(stored.path, stored.files)
    # The converter would replace the hyphen in a folder name such as Phi-3 by a space.
    given = ("--model-name", name.text) if name.strips else ()
    conversion = Conversion(script, ftype, (*chosen, *given, *arguments), stored.path, architecture)
    return ConverterLayout(overlay, conversion, chosen, name)


def write_converted(layout: ConverterLayout, path: Path, progress: Progress = silent) -> None:
    """Write the overlay beside ``path``, and let the converter write the GGUF ``path``.

    The overlay is deleted at the end. After an error, no file is left at ``path``. Raises the errors of
    ``run_converter``, and OutputError if the overlay cannot be written.
    """
    place = path.with_name(f".{path.name}.checkpoint")
    try:
        with writing(place):
            place.mkdir()
        checkpoint = place / layout.name.text  # the converter names the model after the folder
        write_overlay(layout.overlay, checkpoint, progress)
        run_converter(layout.conversion, checkpoint, path, progress)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(place, ignore_errors=True)
    with writing(path):
        sync_file(path)
