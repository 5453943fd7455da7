"""Options of ONNX folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from exporter.formats.onnx.weights.precision import Precision, choose, is_precision
from exporter.formats.target import DTYPES, FormatOptions, dtype_option
from exporter.options import option


@dataclass(frozen=True, kw_only=True)
class OnnxOptions(FormatOptions):
    """A folder of ONNX models, one for each of ``precisions``."""

    section: ClassVar[str] = "onnx"

    dtype: str | None = dtype_option()
    precisions: tuple[str, ...] = option(
        (),
        "Precision of an ONNX model: fp32, fp16, int8, int4, int4-sym (no zero points), or by a file's own name: q4, "
        "q4f16, q4-sym, q4f16-sym; all share a folder. Default: fp32.",
        flag="--quant",
        metavar="TYPE",
        accepts=is_precision,
    )
    ops: str = option(
        "standard",
        "ort: fused operators that are faster, and that only ONNX Runtime has.",
        flag="--onnx-ops",
        choices=("standard", "ort"),
    )

    def check(self) -> None:
        """Spell precisions in lower case."""
        object.__setattr__(self, "precisions", tuple(map(str.lower, self.precisions)))

    @property
    def label(self) -> str:
        """The requested precisions."""
        return ", ".join(self.precisions) or ("fp32" if self.dtype is None else self.dtype)

    def chosen(self) -> Sequence[Precision]:
        """Rows of the table of precisions. Raises NotExpressible for a precision that no model has."""
        return choose(DTYPES[self.dtype] if self.dtype else None, self.precisions)
