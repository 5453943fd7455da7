"""Lazy views of stored tensors: rows reordered, transposed, shifted or stacked, in blocks of rows.

To compute a block, a view reads only the source rows of the block, so memory does not grow with the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from exporter.tensors import BLOCK_BYTES, Array, ByteRange, LazyTensor, TensorSpec, blocks, cast


def row_blocks(tensor: LazyTensor, nbytes: int) -> Iterator[Array]:
    """Yield all rows in blocks of about ``nbytes``. A block consists of whole units, and contains at least one unit."""
    spec = tensor.spec
    unit: int = getattr(tensor, "unit", 1)
    step = unit * max(1, nbytes // max(1, unit * spec.row_nbytes))
    for start in range(0, spec.n_rows, step):
        yield tensor.rows(start, min(start + step, spec.n_rows))


@dataclass(frozen=True)
class _OneSource(ABC):
    source: LazyTensor

    @property
    def spec(self) -> TensorSpec:
        """The source's spec, unless a view overrides it."""
        return self.source.spec

    @abstractmethod
    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop) of the view."""

    def segments(self) -> Iterator[ByteRange | Array]:
        """Yield the rows of the view in blocks."""
        yield from row_blocks(self, BLOCK_BYTES)


@dataclass(frozen=True)
class Interleaved(_OneSource):
    """The source with rows i and i + d/2 of each head made neighbours, for ``heads`` heads of d rows.

    Reason: llama.cpp rotates neighbouring rows in some architectures; transformers rotates the two halves of a head.
    """

    heads: int

    @property
    def unit(self) -> int:
        """Number of rows of a head."""
        return self.spec.n_rows // self.heads

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop) of the view. Memory: two copies of the heads that contain the rows."""
        width = self.unit
        first, last = start // width * width, -(-stop // width) * width
        stored = self.source.rows(first, last)
        halves = stored.reshape(-1, 2, width // 2, *stored.shape[1:]).swapaxes(1, 2)
        value: Array = halves.reshape(stored.shape)[start - first : stop - first]
        return value


@dataclass(frozen=True)
class Regrouped(_OneSource):
    """All queries, then all keys, then all values, of a matrix that stores queries, keys and values head by head."""

    heads: int

    @property
    def unit(self) -> int:
        """Number of rows of a head's queries, keys or values."""
        return self.spec.n_rows // (3 * self.heads)

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop) of the view. Memory: two copies of the rows."""
        width = self.unit
        parts = []
        at = start
        while at < stop:
            group, offset = divmod(at, width)
            role, head = divmod(group, self.heads)
            count = min(width - offset, stop - at)
            first = (3 * head + role) * width + offset
            parts.append(self.source.rows(first, first + count))
            at += count
        return np.concatenate(parts) if parts else self.source.rows(0, 0)


@dataclass(frozen=True)
class Transposed(_OneSource):
    """A stored matrix, transposed. Each block needs a pass over the whole source, so blocks are large."""

    @property
    def spec(self) -> TensorSpec:
        """The stored shape, reversed."""
        return replace(self.source.spec, shape=self.source.spec.shape[::-1])

    @property
    def unit(self) -> int:
        """Number of source columns that fill a block."""
        return max(1, BLOCK_BYTES // max(1, self.spec.row_nbytes))

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop) of the view. Memory: the returned rows and a block of the source."""
        value: Array | None = None
        for first, block in blocks(self.source):
            if value is None:
                value = np.empty((stop - start, self.source.spec.n_rows), block.dtype)
            value[:, first : first + len(block)] = block[:, start:stop].T
        assert value is not None, "the matrix has no rows"
        return value


@dataclass(frozen=True)
class Shifted(_OneSource):
    """The source plus a constant, in float16 for a float16 source, as in llama.cpp's converter, else in float32."""

    offset: float

    @property
    def spec(self) -> TensorSpec:
        """The source's spec with the dtype of the sum."""
        stored = self.source.spec
        return stored if stored.dtype == "F16" else replace(stored, dtype="F32")

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop) of the view. Memory: two copies of the rows."""
        value = cast(self.source.rows(start, stop), self.spec.dtype)
        shifted: Array = value + value.dtype.type(self.offset)
        return shifted


@dataclass(frozen=True)
class Stacked:
    """The concatenated rows of several tensors of the same dtype and width."""

    sources: Sequence[LazyTensor]

    @property
    def spec(self) -> TensorSpec:
        """The first source's spec with the total number of rows."""
        first = self.sources[0].spec
        return replace(first, shape=(sum(source.spec.n_rows for source in self.sources), *first.shape[1:]))

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop) of the view. Memory: two copies of the rows."""
        parts, at = [], 0
        for source in self.sources:
            count = source.spec.n_rows
            if at < stop and start < at + count:
                parts.append(source.rows(max(start - at, 0), min(stop - at, count)))
            at += count
        return np.concatenate(parts)

    def segments(self) -> Iterator[ByteRange | Array]:
        """Yield the segments of each source, in order."""
        for source in self.sources:
            yield from source.segments()
