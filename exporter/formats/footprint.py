"""Estimate the peak memory of a run before it starts.

The sum of the process, the headers, blocks in flight, the factors of adapters, and what a format keeps in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from exporter.io.parallel import Budget

if TYPE_CHECKING:
    from exporter.merge.plan import MergePlan

#: An interpreter with numpy, click and the readers. Measured with CPython 3.11.
_PROCESS_BYTES: Final = 40 << 20
#: The specification, place and header entry of a tensor, in the base and in the artifact.
_TENSOR_BYTES: Final = 6 << 10
#: Chunks in flight to the disk, and blocks that the checks compare.
_CHUNK_BYTES: Final = 6 << 20
#: Bytes of memory per byte of tokenizer.json: for its ids only, and for its tokens and merges.
_IDS_FACTOR: Final = 5
_TOKENS_FACTOR: Final = 14
#: llama.cpp's quantiser, a separate process, which holds a tensor in float32.
_QUANTISER_BYTES: Final = 48 << 20
#: transformers holds the model while torch traces it, and again while the graph is optimised.
_TRACER_BYTES: Final = 700 << 20
_TRACER_FACTOR: Final = 3


def peak_nbytes(
    merge: MergePlan,
    budget: Budget,
    *,
    casts: bool,
    parses_vocabulary: bool = False,
    whole_matrices: bool = False,
    library_nbytes: int = 0,
    quantiser: bool = False,
) -> int:
    """Bytes at the peak of writing a format.

    casts: tensors change their dtype. parses_vocabulary: tokens and merges are read, not only ids. whole_matrices:
    matrices other than embedding and head are transposed as a whole. library_nbytes: of packages that the format
    imports. quantiser: llama.cpp's quantiser runs.
    """
    computed = casts or any(change.updates or change.biases or change.replaced for _, change in merge.sources.values())
    nbytes = _PROCESS_BYTES + library_nbytes + _CHUNK_BYTES + _TENSOR_BYTES * len(merge.sources)
    nbytes += merge.factor_nbytes + (budget.block_nbytes if computed else 0)
    if (tokenizer := merge.files.get("tokenizer.json")) is not None:
        nbytes += (_TOKENS_FACTOR if parses_vocabulary else _IDS_FACTOR) * tokenizer.stat().st_size
    if whole_matrices:
        nbytes += _largest(merge, {merge.tie.embedding, merge.tie.head})
    if quantiser:
        nbytes += _QUANTISER_BYTES + _largest(merge, set())
    return nbytes


def tracing_nbytes(nbytes: int) -> int:
    """Bytes at the peak of tracing a model with ``nbytes`` of weights."""
    return _TRACER_BYTES + _TRACER_FACTOR * nbytes


def _largest(merge: MergePlan, without: set[str | None]) -> int:
    """Bytes of the largest tensor in float32."""
    specs = {name: merge.checkpoint.tensors[stored].spec for name, (stored, _) in merge.sources.items()}
    return max((4 * spec.nbytes // spec.itemsize for name, spec in specs.items() if name not in without), default=0)
