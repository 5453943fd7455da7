"""Make the ONNX initialisers that are stored in the external data file.

A checkpoint tensor becomes one float initialiser, or separate initialisers for quantised codes, scales and zero points.

The bytes of an initialiser are computed from the checkpoint tensor in blocks of rows, so that only a few blocks are in
memory at the same time. Values that several initialisers depend on, such as the scales, are computed again for each
initialiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from exporter.formats.onnx.weights.blocks import BLOCK, Blocks
from exporter.formats.onnx.weights.rope import Table, cache
from exporter.formats.rounding import narrowed
from exporter.io.parallel import TOUCHED_BYTES, Budget, in_order
from exporter.tensors import BLOCK_BYTES, Array, ByteRange, LazyTensor, cast, read

#: Suffixes of the initialisers' names after the module path. An unquantised tensor has the first suffix.
WEIGHT: Final = "weight"
SCALES: Final = "scales"
ZERO_POINTS: Final = "zero_points"

#: Number of columns transposed together, so that source rows and target rows stay in the processor's cache.
_TRANSPOSE_COLUMNS: Final = 64

Segments = Iterator[ByteRange | Array]


@dataclass(frozen=True, slots=True)
class Initialiser:
    """An ONNX initialiser that does not have a file offset yet.

    segments: function that yields the initialiser's bytes. dtype: a safetensors dtype name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    rule: str
    segments: Callable[[], Segments]


def rotary_cache(name: str, part: str, table: Table, positions: int, dtype: str) -> Initialiser:
    """Make an initialiser of rotary cosines or sines with the shape (positions, dims / 2)."""

    def segments() -> Segments:
        return (cast(block, dtype) for block in cache(np.cos if part == "cos" else np.sin, table, positions))

    return Initialiser(name, dtype, (positions, len(table.freqs)), "computed", segments)


def in_floats(
    name: str, tensors: Sequence[LazyTensor], dtype: str, rule: str, *, transposed: bool, stacked: bool
) -> Initialiser:
    """Make a float initialiser that concatenates tensors.

    transposed: whether to transpose each tensor from (out, in) to (in, out).
    """
    shape = tensors[0].spec.shape[:: -1 if transposed else 1]
    convert = partial(narrowed, dtype=dtype)

    def segments() -> Segments:
        for tensor in tensors:
            if transposed:
                yield from map(convert, _columns(tensor))
            elif tensor.spec.dtype == dtype:
                yield from tensor.segments()
            else:
                yield from _rows(tensor, convert)

    return Initialiser(name, dtype, (len(tensors), *shape) if stacked else shape, rule, segments)


def in_blocks(
    module: str,
    tensors: Sequence[LazyTensor],
    form: Blocks,
    floats: str,
    rule: str,
    *,
    transposed: bool,
    stacked: bool,
) -> Sequence[Initialiser]:
    """Make the initialisers of matrices (out, in) that are quantised in blocks along each row.

    transposed: whether the checkpoint stores the matrices as (in, out). The codes of a single matrix have the shape
    (out, blocks, bytes), as MatMulNBits requires. The codes of ``stacked`` matrices have the shape (matrices * out,
    bytes), as GatherBlockQuantized requires.
    """
    count, width = tensors[0].spec.shape[:: -1 if transposed else 1]
    per_row, rows = width // BLOCK, len(tensors) * count
    nbytes = BLOCK * form.bits // 8
    shapes: dict[str, tuple[Callable[[Array], Array], str, tuple[int, ...]]] = {
        WEIGHT: (form.codes, "U8", (rows, per_row * nbytes) if stacked else (rows, per_row, nbytes)),
        SCALES: (partial(form.scales, dtype=floats), floats, (rows, per_row)),
        ZERO_POINTS: (form.zero_points, "U8", (rows, -(-per_row * form.bits // 8))),
    }
    if form.symmetric:
        del shapes[ZERO_POINTS]

    def segments(convert: Callable[[Array], Array]) -> Segments:
        for tensor in tensors:
            yield from map(convert, _columns(tensor)) if transposed else _rows(tensor, convert)

    return [
        Initialiser(f"{module}.{suffix}", dtype, shape, rule, partial(segments, convert))
        for suffix, (convert, dtype, shape) in shapes.items()
    ]


def _rows(tensor: LazyTensor, convert: Callable[[Array], Array]) -> Iterator[Array]:
    """Yield the rows of ``tensor`` in blocks, to which several threads apply the function ``convert``.

    The number of rows in a block is a multiple of ``tensor.unit``.
    """
    spec, unit = tensor.spec, getattr(tensor, "unit", 1)
    step = unit * max(1, TOUCHED_BYTES // max(1, unit * spec.row_nbytes)) if len(spec.shape) > 1 else spec.n_rows

    def job(start: int) -> Array:
        return convert(tensor.rows(start, min(start + step, spec.n_rows)))

    yield from in_order((partial(job, start) for start in range(0, spec.n_rows, step)), Budget())


def _columns(tensor: LazyTensor) -> Iterator[Array]:
    """Yield the rows of the transpose of a checkpoint matrix, in blocks.

    Peak memory: the size of the matrix plus one block.
    """
    value = read(tensor)
    step = max(_TRANSPOSE_COLUMNS, BLOCK_BYTES // max(1, len(value) * value.itemsize))
    for start in range(0, value.shape[1], step):
        block = np.empty((min(step, value.shape[1] - start), len(value)), value.dtype)
        for column in range(0, len(block), _TRANSPOSE_COLUMNS):
            last = min(column + _TRANSPOSE_COLUMNS, len(block))
            block[column:last] = value[:, start + column : start + last].T
        yield block
