"""Define lazy views of checkpoint tensors, which reorder, transpose, shift or stack rows in blocks of rows.

To compute a block of rows, a view reads only the rows that the block needs, so memory use does not grow with the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from exporter.tensors import BLOCK_BYTES, Array, ByteRange, LazyTensor, TensorSpec, blocks, cast


def row_blocks(tensor: LazyTensor, nbytes: int) -> Iterator[Array]:
    """Yield all rows of ``tensor``, in blocks of about ``nbytes`` bytes.

    The number of rows in a block is a multiple of ``tensor.unit``, and is never 0.
    """
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
        """Name, dtype and shape of the view.

        A subclass overrides the property if the view differs from the source tensor.
        """
        return self.source.spec

    @abstractmethod
    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) of the view."""

    def segments(self) -> Iterator[ByteRange | Array]:
        """Yield all rows of the view, in blocks."""
        yield from row_blocks(self, BLOCK_BYTES)


@dataclass(frozen=True)
class Interleaved(_OneSource):
    """A view of query or key rows in which rows i and i + d/2 of each head of d rows are neighbours.

    In some of llama.cpp's architectures, the rotary embedding rotates pairs of neighbouring rows, whereas transformers
    rotates row i with row i + d/2.
    """

    heads: int

    @property
    def unit(self) -> int:
        """Number of rows of a head."""
        return self.spec.n_rows // self.heads

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) of the view.

        Peak memory: two copies of all heads that contain the returned rows.
        """
        width = self.unit
        first, last = start // width * width, -(-stop // width) * width
        stored = self.source.rows(first, last)
        halves = stored.reshape(-1, 2, width // 2, *stored.shape[1:]).swapaxes(1, 2)
        value: Array = halves.reshape(stored.shape)[start - first : stop - first]
        return value


@dataclass(frozen=True)
class Regrouped(_OneSource):
    """A view that reorders a matrix in which q, k and v rows are stored head by head.

    The view contains all q rows, then all k rows, then all v rows.
    """

    heads: int

    @property
    def unit(self) -> int:
        """Number of query rows of a head, which equals the head's number of key rows and of value rows."""
        return self.spec.n_rows // (3 * self.heads)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) of the view. Peak memory: two copies of the returned rows."""
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
    """A transposed view of a stored matrix.

    Each block of the view needs a pass over the whole matrix, so blocks are large.
    """

    @property
    def spec(self) -> TensorSpec:
        """Name, dtype and shape of the view: as in the source tensor, but with the two dimensions swapped."""
        return replace(self.source.spec, shape=self.source.spec.shape[::-1])

    @property
    def unit(self) -> int:
        """Number of rows in a block of the view."""
        return max(1, BLOCK_BYTES // max(1, self.spec.row_nbytes))

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) of the view. Peak memory: the returned rows plus a block of the source tensor."""
        value: Array | None = None
        for first, block in blocks(self.source):
            if value is None:
                value = np.empty((stop - start, self.source.spec.n_rows), block.dtype)
            value[:, first : first + len(block)] = block[:, start:stop].T
        assert value is not None, "expected a matrix with rows, found an empty matrix"
        return value


@dataclass(frozen=True)
class Shifted(_OneSource):
    """A view that adds a constant to a tensor.

    The dtype of the view is float16 for a float16 source, otherwise float32, as in llama.cpp's converter.
    """

    offset: float

    @property
    def spec(self) -> TensorSpec:
        """Name, dtype and shape of the view: as in the source tensor, but with the dtype of the sum."""
        stored = self.source.spec
        return stored if stored.dtype == "F16" else replace(stored, dtype="F32")

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) of the view. Peak memory: two copies of the returned rows."""
        value = cast(self.source.rows(start, stop), self.spec.dtype)
        shifted: Array = value + value.dtype.type(self.offset)
        return shifted


@dataclass(frozen=True)
class Stacked:
    """A view that concatenates the rows of several tensors of equal dtype and width."""

    sources: Sequence[LazyTensor]

    @property
    def spec(self) -> TensorSpec:
        """Name, dtype and shape of the view: as in the first source tensor, but with the rows of all source tensors."""
        first = self.sources[0].spec
        return replace(first, shape=(sum(source.spec.n_rows for source in self.sources), *first.shape[1:]))

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) of the view. Peak memory: two copies of the returned rows."""
        parts, at = [], 0
        for source in self.sources:
            count = source.spec.n_rows
            if at < stop and start < at + count:
                parts.append(source.rows(max(start - at, 0), min(stop - at, count)))
            at += count
        return np.concatenate(parts)

    def segments(self) -> Iterator[ByteRange | Array]:
        """Yield the segments (byte ranges or arrays) of all source tensors, one tensor after another."""
        for source in self.sources:
            yield from source.segments()
