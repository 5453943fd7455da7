"""Divides the adapter's change of a parameter among the stored tensors that make up the parameter.

An adapter changes parameters of the loaded model. A checkpoint may store a parameter as several tensors, as one slice
of a larger tensor, or transposed. ``Part`` maps the elements of a parameter to the elements of one stored tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from exporter.io.files import version_of
from exporter.models.placement import Block, Run, as_array
from exporter.sources.hf.safetensors import FileTensor
from exporter.tensors import Array, ByteRange, TensorSpec, read


@dataclass(frozen=True, eq=False)
class Part:
    """The elements of a parameter that one stored tensor contains.

    block: the position of the stored tensor within the parameter. shape: the shape of the parameter. stored_shape: the
    shape of the stored tensor. Instances of ``Part`` are compared by identity, because their positions are numpy
    arrays.
    """

    block: Block
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]

    @property
    def expert(self) -> int | None:
        """Index of the expert if the stored tensor is the matrix of one expert in a stack, else None."""
        first = self.block.axes[0]
        return int(as_array(first.at)[0]) if len(self.shape) == 3 and first.stored_axis is None else None

    @property
    def is_transposed(self) -> bool:
        """Whether the rows of the stored matrix are columns of the parameter's matrix."""
        rows, columns = self.block.axes[-2:]
        return (rows.stored_axis or 0) > (columns.stored_axis or 0)

    def positions(self, axis: int) -> tuple[Array, Array]:
        """Return (positions along ``axis`` of the parameter, positions of the same elements in the stored tensor)."""
        return as_array(self.block.axes[axis].at), as_array(self.block.axes[axis].stored)

    @cached_property
    def covers_stored(self) -> bool:
        """Whether every element of the stored tensor belongs to the parameter."""
        held = {axis.stored_axis: _length(axis.at) for axis in self.block.axes if axis.stored_axis is not None}
        return all(held.get(number, size) == size for number, size in enumerate(self.stored_shape))

    def covers_axis(self, axis: int) -> bool:
        """Whether the stored tensor covers the parameter's full length along ``axis``, where -1 is the last axis."""
        return _length(self.block.axes[axis].at) == self.shape[axis]


def _length(positions: Run | Array) -> int:
    return positions.length if isinstance(positions, Run) else len(positions)


@dataclass(frozen=True)
class PartTensor(FileTensor):
    """The part of a whole parameter in an adapter file that belongs to one stored tensor.

    whole: the parameter in the adapter file, which stays in memory while its parts are read one after the other.
    """

    whole: FileTensor
    part: Part

    @classmethod
    def of(cls, whole: FileTensor, part: Part) -> PartTensor:
        """Return the part of ``whole`` that belongs to the stored tensor that ``part`` describes."""
        spec = TensorSpec(whole.spec.name, whole.spec.dtype, part.stored_shape)
        return cls(spec, ByteRange(whole.place.path, whole.place.offset_bytes, spec.nbytes), whole=whole, part=part)

    def rows(self, start: int, stop: int) -> Array:
        """Read the rows [start, stop) of this part of the parameter. Peak memory: one copy of the whole parameter."""
        return self._value[start:stop]

    def segments(self) -> Iterator[ByteRange | Array]:
        """Yield this part of the parameter as a single array."""
        yield self._value

    @property
    def _value(self) -> Array:
        axes = self.part.block.axes
        value = _whole(self.whole)[np.ix_(*[as_array(axis.at) for axis in axes])]
        kept = [number for number, axis in enumerate(axes) if axis.stored_axis is not None]
        value = value.reshape([value.shape[number] for number in kept])
        order = np.argsort([axes[number].stored_axis or 0 for number in kept])
        value = value.transpose(order)
        out = np.empty(self.part.stored_shape, value.dtype)
        places = [as_array(axes[kept[number]].stored) for number in order]
        out[np.ix_(*places)] = value
        return out


def _whole(tensor: FileTensor) -> Array:
    """Read a whole parameter, and cache it, because several blocks of rows of several parts need the values."""
    return _read_whole(tensor, version_of(tensor.place.path))


@lru_cache(maxsize=1)
def _read_whole(tensor: FileTensor, version: tuple[int, ...]) -> Array:
    """Read a whole parameter. version: the version of the file; another version is read anew."""
    value = read(tensor)
    value.flags.writeable = False
    return value
