"""How much memory a run takes at its peak, told before it starts.

An estimate from what is known: the process itself, the headers, blocks under way, factors that are held, and what a
format keeps beside them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from exporter.io.parallel import Budget

if TYPE_CHECKING:
    from exporter.merge.plan import MergePlan

#: An interpreter with numpy, click and the readers. Measured with CPython 3.11.
_PROCESS_BYTES: Final = 40 << 20
#: A tensor's specification, its place and its entry in the header, of the base and of the artifact.
_TENSOR_BYTES: Final = 6 << 10
#: Chunks on their way to the disk, and blocks that the checks compare.
_CHUNK_BYTES: Final = 6 << 20
#: Bytes that a byte of tokenizer.json becomes: where its ids alone are needed, and where its tokens and merges are.
_IDS_FACTOR: Final = 5
_TOKENS_FACTOR: Final = 14
#: llama.cpp's quantiser, a process beside ours, which holds a tensor in float32.
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

    casts: tensors change their dtype. parses_vocabulary: tokens and merges are read, not ids alone. whole_matrices: a
    matrix is transposed as a whole, but for embedding and head. library_nbytes: of packages that the format imports.
    quantiser: llama.cpp's takes part.
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
