"""What an export is asked for, and what is known of it before a byte is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import UsageError
from exporter.export.targets import quants_for
from exporter.formats.gguf.quantisation.file_types import FILE_TYPES, SELECTABLE_TENSOR_TYPES
from exporter.formats.gguf.split import Split
from exporter.formats.target import Target
from exporter.merge.plan import MergePlan


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """What the user asked for. ``adapters`` empty: the checkpoint ``base`` itself is exported.

    Adapters and base are paths or hub ids; ``quiet``: no bars while they are downloaded.
    """

    adapters: tuple[Path | str, ...]
    base: str | None
    formats: tuple[str, ...]
    out: Path | None = None
    dtype: str | None = None
    quants: tuple[str, ...] = ()
    level: str = "rows"
    force: bool = False
    prompts: tuple[str, ...] = ()
    report: Path | None = None
    require: tuple[str, ...] = ()
    onnx_ops: str = "standard"
    pre_tokenizer: str | None = None
    converter: Path | None = None
    imatrix: Path | None = None
    token_embedding_type: str | None = None
    output_tensor_type: str | None = None
    split_max_size: str | None = None
    split_max_tensors: int | None = None
    untie: bool = False
    memory_bytes: int | None = None
    max_shard_bytes: int | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if len(set(self.formats)) != len(self.formats):
            raise UsageError(f"--to: expected each format once, found {', '.join(self.formats)}")
        if self.quants and not {"gguf", "onnx"} & set(self.formats):
            raise UsageError("--quant: needs --to gguf or --to onnx")
        if len({quant.lower() for quant in self.quants}) != len(self.quants):
            raise UsageError(f"--quant: expected each type once, found {', '.join(self.quants)}")
        for option, given, fmt in (
            ("--max-shard-size", self.max_shard_bytes, "hf"),
            ("--onnx-ops", self.onnx_ops != "standard", "onnx"),
            ("--pre-tokenizer", self.pre_tokenizer, "gguf"),
            ("--converter", self.converter, "gguf"),
        ):
            if given and fmt not in self.formats:
                raise UsageError(f"{option}: needs --to {fmt}")
        if self.prompts and self.level != "full":
            raise UsageError("--prompts: needs --verify full, which alone runs a model")
        if self.converter and self.pre_tokenizer:
            raise UsageError("--converter: chooses the pre-tokenizer itself, so --pre-tokenizer has no use beside it")
        if self.report and self.level == "off":
            raise UsageError("--report: expected something to report, found --verify off")
        if self.split is not None and "gguf" not in self.formats:
            raise UsageError("--split-max-size, --split-max-tensors: need --to gguf")
        self._check_quantiser()

    @property
    def split(self) -> Split | None:
        """Where GGUF files are cut into parts."""
        return Split.parse(self.split_max_size, self.split_max_tensors)

    def _check_quantiser(self) -> None:
        """Options of llama.cpp's quantiser say what to do with a quantisation: without one they would do nothing."""
        made = [quant for quant in quants_for("gguf", self.formats, self.quants) if quant in FILE_TYPES]
        types = {"--token-embedding-type": self.token_embedding_type, "--output-tensor-type": self.output_tensor_type}
        for option, value in types.items():
            if value is not None and self.converter:
                raise UsageError(f"{option}: is for llama.cpp's quantiser, which does not run beside --converter")
            if value is not None and not made:
                raise UsageError(f"{option}: needs --to gguf and a quantisation, such as --quant Q4_K_M")
            if value is not None and value.upper() not in SELECTABLE_TENSOR_TYPES:
                raise UsageError(f"{option}: expected a type of ggml, such as Q6_K or F16, found {value}")
        if self.imatrix is not None and not set(made) - {"Q8_0"}:
            raise UsageError("--imatrix: needs --to gguf and a --quant below Q8_0, which makes no use of it")


@dataclass(frozen=True)
class ExportPlan:
    """Everything that is known before a byte of output exists."""

    spec: ExportSpec
    merge: MergePlan
    targets: Sequence[Target]
    out: Path

    @property
    def nbytes(self) -> int:
        """Bytes of all artifacts."""
        return sum(target.nbytes for target in self.targets)

    @property
    def work_nbytes(self) -> int:
        """Bytes that lie on the disk at once while it is written: an unquantised file may be needed on the way."""
        more = [target.work_nbytes - target.nbytes for target in self.targets if target.work_nbytes]
        return self.nbytes + max(more, default=0)
