"""Estimate the peak memory of an export before the export starts.

The estimate includes the memory for the Python process, the tensor headers, one block of tensor rows, the low-rank
factors of the adapters, and the data that the writer of the output format keeps in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from exporter.io.parallel import Budget

if TYPE_CHECKING:
    from exporter.merge.plan import MergePlan

#: Memory of an interpreter with numpy, click and the readers, measured with CPython 3.11.
_PROCESS_BYTES: Final = 40 << 20
#: Memory of a tensor's specification, slot and header entry, in the base and in the artifact.
_TENSOR_BYTES: Final = 6 << 10
#: Memory of the chunks being written to disk, and of the blocks that the checks compare.
_CHUNK_BYTES: Final = 6 << 20
#: Bytes of memory per byte of tokenizer.json: if only the ids are read, and if tokens and merges are read.
_IDS_FACTOR: Final = 5
_TOKENS_FACTOR: Final = 14
#: Memory of llama.cpp's quantiser, a separate process that keeps a tensor in float32.
_QUANTISER_BYTES: Final = 48 << 20
#: Memory of llama.cpp's converter, a separate process that imports torch and keeps two copies of a tensor in float32.
_CONVERTER_BYTES: Final = 332 << 20
_CONVERTER_COPIES: Final = 2
#: transformers keeps the model in memory while torch traces the model, and a second copy while the graph is optimised.
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
    converter: bool = False,
) -> int:
    """Return the estimated peak memory, in bytes, of an export to one output format.

    casts: whether the export converts tensors to another dtype. parses_vocabulary: whether the export reads the tokens
    and merges of tokenizer.json, rather than only the token ids. whole_matrices: whether the export transposes matrices
    other than the embedding and the LM head; a matrix is loaded as a whole to be transposed. library_nbytes: memory, in
    bytes, of the Python packages that the output format imports. quantiser: whether the export starts llama.cpp's
    quantiser. converter: whether the export starts llama.cpp's converter.
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
    if converter:
        nbytes += _CONVERTER_BYTES + _CONVERTER_COPIES * _largest(merge, set())
    return nbytes


def tracing_nbytes(nbytes: int) -> int:
    """Return the estimated peak memory, in bytes, of tracing a model with torch.onnx.

    nbytes: size of the model's weights in bytes.
    """
    return _TRACER_BYTES + _TRACER_FACTOR * nbytes


def _largest(merge: MergePlan, without: set[str | None]) -> int:
    """Return the float32 size, in bytes, of the merged model's largest tensor. without: names of tensors to ignore."""
    specs = {name: merge.checkpoint.tensors[stored].spec for name, (stored, _) in merge.sources.items()}
    return max((4 * spec.nbytes // spec.itemsize for name, spec in specs.items() if name not in without), default=0)
