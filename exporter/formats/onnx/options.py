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
    """Options for exporting a folder with one ONNX model for each precision in ``precisions``."""

    section: ClassVar[str] = "onnx"

    dtype: str | None = dtype_option()
    precisions: tuple[str, ...] = option(
        (),
        "Precision of an ONNX model: fp32, fp16, int8, int4, int4-sym (int4 without zero points), or a model "
        "file suffix (q4, q4f16, q4-sym, q4f16-sym). All precisions are written to a single folder. Default: fp32.",
        flag="--quant",
        metavar="TYPE",
        accepts=is_precision,
    )
    ops: str = option(
        "standard",
        "Operators of the ONNX graph: standard, or ort for faster fused operators that run only in ONNX Runtime.",
        flag="--onnx-ops",
        choices=("standard", "ort"),
    )

    def check(self) -> None:
        """Convert the names in ``precisions`` to lower case."""
        object.__setattr__(self, "precisions", tuple(map(str.lower, self.precisions)))

    @property
    def label(self) -> str:
        """The requested precisions."""
        return ", ".join(self.precisions) or ("fp32" if self.dtype is None else self.dtype)

    def chosen(self) -> Sequence[Precision]:
        """Return the ``Precision`` objects of the requested precisions.

        Raises NotExpressible for an unsupported precision.
        """
        return choose(DTYPES[self.dtype] if self.dtype else None, self.precisions)
