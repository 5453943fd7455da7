"""Plan a GGUF LoRA from the user's options."""

from __future__ import annotations

from pathlib import Path

from exporter.formats.footprint import peak_nbytes
from exporter.formats.gguf_lora.factors import plan_gguf_lora, write_gguf_lora
from exporter.formats.gguf_lora.options import GgufLoraOptions
from exporter.formats.target import DTYPES, Scratch, Target
from exporter.io.parallel import Budget
from exporter.merge.plan import MergePlan
from exporter.progress import Progress


def plan_target(options: GgufLoraOptions, merge: MergePlan, budget: Budget) -> Target:
    """Plan a GGUF LoRA that contains only the adapter. Reads the adapter's tensors.

    Raises NotExpressible if a GGUF LoRA cannot represent the adapter.
    """
    layout = plan_gguf_lora(merge, DTYPES[options.label])

    def write(path: Path, progress: Progress, scratch: Scratch) -> None:
        write_gguf_lora(layout, path, progress)

    return Target(
        format=options.section,
        storage=layout.dtype,
        nbytes=layout.nbytes,
        peak_nbytes=peak_nbytes(merge, budget, casts=bool(options.dtype)),
        write=write,
    )
