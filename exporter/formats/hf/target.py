"""Plan the tensors and files of a Hugging Face checkpoint from the user's options."""

from __future__ import annotations

from pathlib import Path

from exporter.formats.footprint import peak_nbytes
from exporter.formats.hf.options import HfOptions
from exporter.formats.hf.write import plan_hf, write_hf
from exporter.formats.target import DTYPES, Scratch, Target
from exporter.io.parallel import Budget
from exporter.merge.plan import MergePlan
from exporter.progress import Progress


def plan_target(options: HfOptions, merge: MergePlan, budget: Budget) -> Target:
    """Plan the tensors and files of the Hugging Face checkpoint to be written.

    The function reads tensor shapes only, no weights.
    """
    dtype = DTYPES[options.dtype] if options.dtype else None
    layout = plan_hf(merge.model(dtype, budget), options.max_shard_size)
    stored = merge.checkpoint.tensors[merge.checkpoint.tie.embedding].spec.dtype

    def write(path: Path, progress: Progress, scratch: Scratch) -> None:
        write_hf(layout, path, progress)

    return Target(
        format=options.section,
        storage=dtype or stored,
        nbytes=layout.nbytes,
        peak_nbytes=peak_nbytes(merge, budget, casts=dtype is not None),
        write=write,
    )
