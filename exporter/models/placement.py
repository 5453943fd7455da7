"""Describe which elements of stored tensors form a parameter of the loaded model.

When transformers loads a checkpoint, many parameters are made from stored tensors: experts are stacked, projections are
concatenated, fused projections are split, matrices are transposed, and rows are permuted. Because each conversion only
rearranges elements along whole axes, a ``Block`` describes how a stored tensor maps to a parameter by one array of
positions per axis. Source: the classes ``Chunk``, ``Concatenate``, ``Interleave``, ``MergeModulelist``, ``Transpose``,
``PermuteForRope`` and ``ErnieFuseAndSplitTextVisionExperts`` in transformers' core_model_loading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Run:
    """The consecutive positions start, start + 1, …, start + length - 1 along an axis."""

    start: int
    length: int

    def array(self) -> Indices:
        """Return the positions as an array."""
        return np.arange(self.start, self.start + self.length)


#: Positions along an axis: consecutive positions, or an array of positions in any order.
Positions = Run | Indices


def as_array(positions: Positions) -> Indices:
    """Convert ``positions`` to an array of indices."""
    return positions.array() if isinstance(positions, Run) else positions


@dataclass(frozen=True)
class Axis:
    """The mapping between positions along an axis of a parameter and positions along an axis of a stored tensor.

    stored_axis: the number of the stored tensor's axis, or None if the whole stored tensor is at a single position of
    the parameter's axis, like an expert in a stack. at: positions along the parameter's axis. stored: the corresponding
    positions along the stored axis, or the position 0 if ``stored_axis`` is None.
    """

    stored_axis: int | None
    at: Positions
    stored: Positions


@dataclass(frozen=True)
class Block:
    """The part of the stored tensor ``name`` that a parameter contains, with one ``Axis`` per parameter axis."""

    name: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Placed:
    """A parameter of shape ``shape`` that is made of non-overlapping blocks of stored tensors."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the parameter equals a stored tensor, or equals the leading elements of a larger stored tensor."""
        if len(self.blocks) != 1:
            return False
        whole = [Axis(number, Run(0, size), Run(0, size)) for number, size in enumerate(self.shape)]
        return all(
            axis.stored_axis == want.stored_axis and axis.at == want.at and axis.stored == want.stored
            for axis, want in zip(self.blocks[0].axes, whole, strict=True)
            if isinstance(axis.at, Run) and isinstance(axis.stored, Run)
        ) and all(isinstance(axis.at, Run) for axis in self.blocks[0].axes)


def stored(name: str, shape: Sequence[int]) -> Placed:
    """Return a parameter that equals the stored tensor ``name`` of shape ``shape``."""
    axes = tuple(Axis(number, Run(0, size), Run(0, size)) for number, size in enumerate(shape))
    return Placed(tuple(shape), (Block(name, axes),))


def size_of(part: Placed, axis: int) -> int:
    """Return the number of positions along ``axis``. Raises ValueError if the parameter does not have the axis."""
    if axis >= len(part.shape):
        raise ValueError(f"expected tensors with at least {axis + 1} axes, found the shape {part.shape}")
    return part.shape[axis]


def stack(parts: Sequence[Placed], axis: int) -> Placed:
    """Stack parameters of equal shape along a new axis, as ``torch.stack`` does. Raises ValueError."""
    shape = parts[0].shape
    if axis > len(shape) or any(part.shape != shape for part in parts):
        raise ValueError("expected tensors of equal shape in a stack")
    blocks = [
        replace(block, axes=(*block.axes[:axis], Axis(None, Run(number, 1), Run(0, 1)), *block.axes[axis:]))
        for number, part in enumerate(parts)
        for block in part.blocks
    ]
    return Placed((*shape[:axis], len(parts), *shape[axis:]), tuple(blocks))


def concatenate(parts: Sequence[Placed], axis: int) -> Placed:
    """Concatenate parameters along ``axis``, as ``torch.cat`` does. Raises ValueError."""
    shape = parts[0].shape
    blocks: list[Block] = []
    offset = 0
    for part in parts:
        if len(part.shape) <= axis or _without(part.shape, axis) != _without(shape, axis):
            raise ValueError("expected equal lengths of all axes except the axis of the concatenation")
        blocks += [_moved(block, axis, offset) for block in part.blocks]
        offset += part.shape[axis]
    return Placed((*shape[:axis], offset, *shape[axis + 1 :]), tuple(blocks))


def chunks(part: Placed, count: int, axis: int) -> list[Placed]:
    """Split a parameter along ``axis`` into ``count`` chunks, as ``torch.chunk`` does. Raises ValueError."""
    length = size_of(part, axis)
    size = max(1, -(-length // count))
    bounds = [(start, min(start + size, length)) for start in range(0, length, size)]
    return [cut(part, axis, start, stop) for start, stop in bounds]


def transpose(part: Placed, first: int, second: int) -> Placed:
    """Swap two axes of a parameter. Raises ValueError if the parameter does not have the axes."""
    size_of(part, max(first, second))
    order = list(range(len(part.shape)))
    order[first], order[second] = order[second], order[first]
    blocks = (replace(block, axes=tuple(block.axes[number] for number in order)) for block in part.blocks)
    return Placed(tuple(part.shape[number] for number in order), tuple(blocks))


def permute(part: Placed, axis: int, order: Indices) -> Placed:
    """Return the parameter whose element ``k`` along ``axis`` is element ``order[k]`` of ``part``."""
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    blocks = [
        _with_axis(block, axis, replace(block.axes[axis], at=position[as_array(block.axes[axis].at)]))
        for block in part.blocks
    ]
    return Placed(part.shape, tuple(blocks))


def interleaved(size: int, *, inverse: bool) -> Indices:
    """Return the order 0, 2, 4, …, 1, 3, 5, … of transformers' ``Interleave``, or the inverse if ``inverse`` is set.

    Raises ValueError if ``size`` is odd.
    """
    if size % 2:
        raise ValueError(f"expected an even number of interleaved rows, found {size}")
    shape = (2, size // 2) if inverse else (size // 2, 2)
    return np.arange(size).reshape(shape).T.reshape(-1)


def rotary(size: int, heads: int, *, inverse: bool) -> Indices:
    """Return the row order that ``PermuteForRope`` produces by interleaving the rows of each attention head."""
    half = size // heads // 2
    shape = (heads, 2, half) if inverse else (heads, half, 2)
    return np.arange(size).reshape(shape).swapaxes(1, 2).reshape(-1)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _with_axis(block: Block, axis: int, value: Axis) -> Block:
    return replace(block, axes=(*block.axes[:axis], value, *block.axes[axis + 1 :]))


def _moved(block: Block, axis: int, offset: int) -> Block:
    at = block.axes[axis].at
    moved = Run(at.start + offset, at.length) if isinstance(at, Run) else at + offset
    return _with_axis(block, axis, replace(block.axes[axis], at=moved))


def cut(part: Placed, axis: int, start: int, stop: int) -> Placed:
    """Return the elements [start, stop) of a parameter along ``axis``."""
    blocks = []
    for block in part.blocks:
        here = block.axes[axis]
        if isinstance(here.at, Run) and isinstance(here.stored, Run):
            first, last = max(start, here.at.start), min(stop, here.at.start + here.at.length)
            if first < last:
                shift = first - here.at.start if here.stored_axis is not None else 0
                length = last - first
                kept = Axis(here.stored_axis, Run(first - start, length), Run(here.stored.start + shift, length))
                blocks.append(_with_axis(block, axis, kept))
            continue
        at, source = as_array(here.at), as_array(here.stored)
        inside = (at >= start) & (at < stop)
        if inside.any():
            blocks.append(_with_axis(block, axis, Axis(here.stored_axis, at[inside] - start, source[inside])))
    return Placed((*part.shape[:axis], stop - start, *part.shape[axis + 1 :]), tuple(blocks))
