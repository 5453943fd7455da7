"""What the data file is made of: a tensor becomes one initialiser, or codes, scales and zero points.

Each comes straight from the stored rows, in blocks, so that nothing larger than a block is held; what two of them need,
such as the scales, is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from exporter.errors import BadInput
from exporter.formats.onnx.weights.blocks import BLOCK, Blocks
from exporter.formats.onnx.weights.rope import Table, cache
from exporter.io.parallel import TOUCHED_BYTES, Budget, in_order
from exporter.tensors import BLOCK_BYTES, Array, ByteRange, LazyTensor, cast, read

#: Names of the initialisers below the module; the first is also that of every tensor that is not quantised.
WEIGHT: Final = "weight"
SCALES: Final = "scales"
ZERO_POINTS: Final = "zero_points"

#: Columns that are transposed at once: few enough that source rows and target rows stay in the processor's cache.
_TRANSPOSE_COLUMNS: Final = 64

Segments = Iterator[ByteRange | Array]


@dataclass(frozen=True, slots=True)
class Initialiser:
    """A tensor of the data file, not yet placed: ``segments`` gives its bytes; dtype as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rule: str
    segments: Callable[[], Segments]


def rotary_cache(name: str, part: str, table: Table, positions: int, dtype: str) -> Initialiser:
    """The cosines or sines of a table of angles, (positions, dims / 2)."""

    def segments() -> Segments:
        return (cast(block, dtype) for block in cache(np.cos if part == "cos" else np.sin, table, positions))

    return Initialiser(name, dtype, (positions, len(table.freqs)), "computed", segments)


def in_floats(
    name: str, tensors: Sequence[LazyTensor], dtype: str, rule: str, *, transposed: bool, stacked: bool
) -> Initialiser:
    """Stored tensors one after the other; each a matrix (out, in) that becomes (in, out) if ``transposed``."""
    shape = tensors[0].spec.shape[:: -1 if transposed else 1]
    convert = partial(_narrow, dtype=dtype)

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
    """Matrices (out, in), stored as (in, out) if ``transposed``, in blocks along their rows.

    One matrix lies as MatMulNBits wants it, codes as (out, blocks, bytes); ``stacked`` ones lie as GatherBlockQuantized
    looks rows up, (matrices * out, bytes).
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
    """Rows, converted a block at a time on several threads; a view's rows in the units that it makes together."""
    spec, unit = tensor.spec, getattr(tensor, "unit", 1)
    step = unit * max(1, TOUCHED_BYTES // max(1, unit * spec.row_nbytes)) if len(spec.shape) > 1 else spec.n_rows

    def job(start: int) -> Array:
        return convert(tensor.rows(start, min(start + step, spec.n_rows)))

    yield from in_order((partial(job, start) for start in range(0, spec.n_rows, step)), Budget())


def _columns(tensor: LazyTensor) -> Iterator[Array]:
    """The columns of a stored matrix as rows, in blocks. Memory: the matrix and one block."""
    value = read(tensor)
    step = max(_TRANSPOSE_COLUMNS, BLOCK_BYTES // max(1, len(value) * value.itemsize))
    for start in range(0, value.shape[1], step):
        block = np.empty((min(step, value.shape[1] - start), len(value)), value.dtype)
        for column in range(0, len(block), _TRANSPOSE_COLUMNS):
            last = min(column + _TRANSPOSE_COLUMNS, len(block))
            block[column:last] = value[:, start + column : start + last].T
        yield block


def _narrow(value: Array, *, dtype: str) -> Array:
    """Rounded once. Raises BadInput for a value beyond the range of ``dtype``."""
    out = cast(value, dtype)
    if dtype == "F16" and not np.isfinite(out).all():
        raise BadInput("expected finite values that F16 can hold (up to 65504), found another")
    return out
