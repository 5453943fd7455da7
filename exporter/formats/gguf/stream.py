"""Write a planned GGUF sequentially: copy unchanged tensors as raw bytes, and encode all other tensors in blocks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from exporter.errors import in_tensor
from exporter.formats.gguf.plan import GgufLayout, PlannedTensor
from exporter.formats.gguf.quantisation.tensors import encode
from exporter.formats.gguf.writer import ALIGNMENT
from exporter.formats.views import row_blocks
from exporter.io.output import OutputFile
from exporter.merge.model import MergedModel
from exporter.progress import Progress, silent
from exporter.tensors import LazyTensor

#: Approximate size of a converted row block, in stored bytes. Q8_0 needs several temporary float32 arrays, and blocks
#: that fit in the processor's cache are twice as fast as large blocks.
_CONVERT_BYTES: Final = 1 << 20


def write_gguf(layout: GgufLayout, path: Path, progress: Progress = silent) -> None:
    """Write the planned GGUF ``layout`` to the new file ``path``. Writing equal layouts gives byte-identical files.

    Peak memory: the size of the GGUF's header plus a few megabytes. Raises OutputError if ``path`` exists or writing
    fails, and BadInput if a tensor type cannot represent a value or if the checkpoint has changed since the GGUF was
    planned. After an error, no file is left at ``path``.
    """
    ledger = layout.model.ledger()
    with ThreadPoolExecutor(1) as executor, OutputFile(path, progress, nbytes=layout.nbytes) as out:
        header = executor.submit(layout.header)  # computing the digest of the base's embedding takes a while
        out.write(layout.draft_header())
        for planned in layout.tensors:
            if planned.tensor is None:
                assert planned.value is not None
                out.write(planned.value)
            else:
                _write_tensor(layout.model, planned, planned.tensor, out)
            for name in planned.sources:
                ledger.take(name, planned.rule)
            out.pad_to(ALIGNMENT)
        for name, rule in layout.dropped.items():
            ledger.take(name, rule)
        ledger.close()
        out.begin_with(header.result())


def _write_tensor(model: MergedModel, planned: PlannedTensor, tensor: LazyTensor, out: OutputFile) -> None:
    if tensor.spec.dtype == planned.entry.type:
        out.write_segments(tensor.segments(), planned.entry.nbytes)
        return
    blocks = (encode(rows, planned.entry.type) for rows in row_blocks(tensor, _CONVERT_BYTES))
    first, *others = planned.sources
    with in_tensor(model.where(first), planned.entry.name if others else first):
        out.write_segments(blocks, planned.entry.nbytes)
