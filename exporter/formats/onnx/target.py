"""Plan an ONNX folder from the user's options.

The ONNX graph is built by ttexport for the built-in model families, and traced by torch for other models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from exporter.errors import NotExpressible
from exporter.families import describe
from exporter.formats.footprint import peak_nbytes, tracing_nbytes
from exporter.formats.onnx.options import OnnxOptions
from exporter.formats.onnx.plan import plan_onnx
from exporter.formats.onnx.trace.plan import plan_traced, write_traced
from exporter.formats.onnx.write import write_onnx
from exporter.formats.target import Scratch, Target
from exporter.io.parallel import Budget
from exporter.merge.model import MergedModel
from exporter.merge.plan import MergePlan
from exporter.progress import Progress

#: Name of the maker for models with a family, in the output of ``plan``.
_OWN: Final = "family graph"
#: Memory of the imported packages onnx and onnx_ir, measured with CPython 3.11.
_LIBRARY_BYTES: Final = 42 << 20


def plan_target(options: OnnxOptions, merge: MergePlan, budget: Budget) -> Target:
    """Plan the ONNX folder. Reads tensor shapes only. Raises NotExpressible if the model cannot be exported."""
    precisions = options.chosen()
    model = merge.model("F32", budget)
    storage = ", ".join(precision.name for precision in precisions)
    try:
        describe(model.config, "onnx")
    except NotExpressible as refusal:
        return _traced(options, model, storage, refusal)
    layout = plan_onnx(model, precisions, ops=options.ops)

    def write(path: Path, progress: Progress, scratch: Scratch) -> None:
        write_onnx(layout, path, progress)

    return Target(
        format=options.section,
        storage=storage,
        nbytes=layout.nbytes,
        peak_nbytes=peak_nbytes(merge, budget, casts=True, whole_matrices=True, library_nbytes=_LIBRARY_BYTES),
        write=write,
        maker=_OWN,
    )


def _traced(options: OnnxOptions, model: MergedModel, storage: str, refusal: NotExpressible) -> Target:
    if storage != "fp32" or options.ops != "standard":
        reason = f"{refusal.reason}, and a traced model can be written only in fp32 with standard operators"
        raise NotExpressible(
            "onnx", reason, instead="omit --dtype, --quant and --onnx-ops to trace the model"
        ) from refusal
    traced = plan_traced(model, refusal)

    def write(path: Path, progress: Progress, scratch: Scratch) -> None:
        write_traced(traced, path, progress)

    return Target(
        format=options.section,
        storage=storage,
        nbytes=traced.nbytes,
        peak_nbytes=tracing_nbytes(traced.nbytes),
        write=write,
        notes=traced.notes,
        maker=traced.maker,
    )
