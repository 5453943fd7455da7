"""Command-line options for writing GGUF models and GGUF LoRA adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Self

from exporter.formats.gguf.converter.location import source_files
from exporter.formats.gguf.quantisation.file_types import FILE_TYPES, SELECTABLE_TENSOR_TYPES
from exporter.formats.target import DTYPES, FormatOptions, dtype_option
from exporter.options import ValueType, option

if TYPE_CHECKING:
    from exporter.formats.gguf.split import Split


#: Options of llama.cpp's converter that ttexport sets, or whose output is not a single GGUF with the model.
_OWN_ARGUMENTS: Final = (
    "--outfile",
    "--outtype",
    "--remote",
    "--dry-run",
    "--vocab-only",
    "--print-supported-models",
    "--split-max-tensors",
    "--split-max-size",
    "--bigendian",
    "--mmproj",
    "--mtp",
    "--dspark",
)


def is_file_type(name: str) -> bool:
    """Whether ``name``, in upper or lower case, is a dtype or one of llama.cpp's quantisation types."""
    return name.lower() in DTYPES or name.upper() in FILE_TYPES


@dataclass(frozen=True, kw_only=True)
class GgufOptions(FormatOptions):
    """Options for writing one GGUF file for each type in ``types``.

    If ``types`` is empty, a single file in the base's dtype is written.
    """

    section: ClassVar[str] = "gguf"

    dtype: str | None = dtype_option()
    types: tuple[str, ...] = option(
        (),
        "Type of a GGUF file: f32, f16, bf16, or a llama.cpp quantisation such as Q8_0 or Q4_K_M. A separate file is "
        "written for each type. Default: the dtype of the base model.",
        flag="--quant",
        metavar="TYPE",
        accepts=is_file_type,
    )
    imatrix: Path | None = option(
        None, "File with the importance matrix for llama.cpp's quantisation.", type=ValueType.PATH, metavar="FILE"
    )
    token_embedding_type: str | None = option(
        None,
        "ggml type of token_embd.weight in quantised files. Default: llama.cpp's choice for the file type.",
        metavar="TYPE",
    )
    output_tensor_type: str | None = option(
        None,
        "ggml type of output.weight in quantised files. Default: llama.cpp's choice for the file type.",
        metavar="TYPE",
    )
    split_max_size: int | None = option(
        None,
        "Split the GGUF into parts with at most SIZE bytes of tensor data, for example 2G.",
        type=ValueType.SIZE,
        metavar="SIZE",
    )
    split_max_tensors: int | None = option(
        None, "Split the GGUF into parts of at most N tensors.", type=ValueType.COUNT, metavar="N"
    )
    pre_tokenizer: str | None = option(
        None,
        "llama.cpp's name of the pre-tokenizer. Default: the name that matches tokenizer.json, if ttexport knows it.",
        metavar="NAME",
    )
    converter: Path | None = option(
        None,
        "Path of llama.cpp's convert_hf_to_gguf.py, or of its folder. The script writes the GGUF without network "
        "access, and its output is verified. Default: for a model without a built-in family, the converter that "
        "ttexport converter install has installed.",
        type=ValueType.PATH,
        metavar="PATH",
    )
    converter_arguments: tuple[str, ...] = option(
        (),
        "Option to pass to llama.cpp's converter, for example --fuse-qkv. The converter then writes the GGUF of any "
        "model.",
        flag="--converter-arg",
        metavar="OPTION",
    )
    mmproj: bool = option(
        False,
        "Also write mmproj-NAME.gguf, the file from which llama.cpp loads the encoders of images and sounds. "
        "llama.cpp's converter writes the file, and OUT is then a folder.",
        type=ValueType.SWITCH,
    )

    def check(self) -> None:
        """Check that the options are compatible with each other.

        For example, options for llama.cpp's quantiser require a quantised type.
        """
        object.__setattr__(self, "types", tuple(_spelled(name) for name in self.types))
        if self.dtype and (plain := [name for name in self.types if name in DTYPES]):
            raise self.fault("types", f"expected only quantised types if {{dtype}} is given, found {plain[0]}")
        quantised = [name for name in self.types if name in FILE_TYPES]
        for name in ("token_embedding_type", "output_tensor_type"):
            if (chosen := getattr(self, name)) is None:
                continue
            if not quantised:
                raise self.fault(name, "this option needs a quantised type in {types}, such as Q4_K_M")
            if chosen.upper() not in SELECTABLE_TENSOR_TYPES:
                raise self.fault(name, f"expected a ggml type such as Q6_K or F16, found {chosen!r:.80}")
            object.__setattr__(self, name, chosen.upper())
        if self.imatrix is not None and not any(FILE_TYPES[name].uses_imatrix for name in quantised):
            reason = (
                "an importance matrix needs a quantised type below Q8_0 in {types}, because Q8_0 ignores the matrix"
            )
            raise self.fault("imatrix", reason)
        if (self.converter or self.converter_arguments) and self.pre_tokenizer:
            reason = "this option cannot be combined with {converter}, because the script chooses the pre-tokenizer"
            raise self.fault("pre_tokenizer", reason)
        for argument in self.converter_arguments:
            if not argument.startswith("--"):
                reason = f"expected an option such as --fuse-qkv or --metadata=FILE, found {argument!r:.80}"
                raise self.fault("converter_arguments", reason)
            if argument.split("=")[0] in _OWN_ARGUMENTS:
                raise self.fault("converter_arguments", f"{argument.split('=')[0]} is an option that ttexport sets")

    def recipe_files(self) -> dict[str, Path]:
        """Return the files that the options name, and the Python files that a given converter imports."""
        paths = self.files()
        given = paths.pop("converter", None)
        return paths | ({f"converter/{name}": path for name, path in source_files(given).items()} if given else {})

    def unquantised(self, dtype: str | None) -> Self:
        """Return the options of the unquantised GGUF, in ``dtype``, from which a quantised GGUF is made."""
        return replace(
            self.whole(), types=(), dtype=dtype, imatrix=None, token_embedding_type=None, output_tensor_type=None
        )

    def artifacts(self) -> Sequence[Self]:
        """Return one copy of the options per GGUF file. Only the copy for the file of the encoders has ``mmproj``.

        If an option does not apply to the type of a GGUF file, the copy for the file leaves the option unset.
        """
        if not self.mmproj:
            return [self._of(name) for name in self.types] or (self,)
        native = next((name for name in self.types if name.lower() in DTYPES or name == "Q8_0"), None)
        encoders = replace(self.unquantised(self.dtype), types=(native or "f16",) if self.types else ())
        return [*replace(self, mmproj=False).artifacts(), encoders]

    def whole(self) -> Self:
        """Return a copy of the options that does not split the GGUF into parts."""
        return replace(self, split_max_size=None, split_max_tensors=None)

    def as_released(self) -> Self:
        """Return the options with which a release writes one GGUF file.

        If the file's type is not quantised, the copy has the type in the field ``dtype`` instead of ``types``. If
        ``dtype`` is set, the trained token rows are rounded directly to ``dtype``; otherwise the rows are first rounded
        to the base's dtype.
        """
        plain = self.types[0] if self.types and self.types[0] in DTYPES else None
        return replace(self, types=(), dtype=plain) if plain else self

    @property
    def label(self) -> str:
        """A short text that lists the requested file types."""
        return ", ".join(self.types) or self.dtype or "as stored"

    @property
    def storage(self) -> str | None:
        """The requested dtype in safetensors spelling, such as BF16, or None to keep the base's dtype."""
        return DTYPES[self.dtype] if self.dtype else None

    @property
    def file_type(self) -> str | None:
        """The file type of the GGUF, or None if ``types`` is empty and ``storage`` determines the file type.

        An unknown file type raises an error only later, when the GGUF is planned.
        """
        return self.types[0].upper() if self.types else None

    @property
    def split(self) -> Split | None:
        """The limits at which the GGUF is split into parts, or None to write a single file."""
        if self.split_max_size is None and self.split_max_tensors is None:
            return None
        from exporter.formats.gguf.split import Split  # a lazy import: the module reads GGUF files

        return Split(self.split_max_size, self.split_max_tensors)

    def _of(self, name: str) -> Self:
        if name in DTYPES:
            return replace(self, types=(name,), imatrix=None, token_embedding_type=None, output_tensor_type=None)
        ignored = name in FILE_TYPES and not FILE_TYPES[name].uses_imatrix
        return replace(self, types=(name,), imatrix=None if ignored else self.imatrix)


def _spelled(name: str) -> str:
    """Return a type name in llama.cpp's spelling: dtypes in lower case, quantisation types in upper case."""
    return name.lower() if name.lower() in DTYPES else name.upper()
