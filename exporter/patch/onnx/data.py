"""A data file of external weights after patching: what is overwritten in it, or, where tensors grow, its new layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from exporter.errors import NotExpressible
from exporter.formats.onnx.weights.placing import aligned
from exporter.patch.onnx.part import PartPatch
from exporter.sources.onnx.tensors import TensorRange
from exporter.tensors import Array, ByteRange

#: Other tools align tensors to pages, or to what a Windows process can map: what moves, moves by multiples of this.
_STEP_BYTES: Final = 64 << 10

Segments = Sequence[ByteRange | Array | bytes]


@dataclass(frozen=True)
class DataPatch:
    """One data file. segments: all its bytes in order, then ``pieces`` (offset, bytes) over them.

    offsets: of each tensor by name, after patching. moved: some tensor grows, so what lies behind it moves.
    """

    path: Path
    segments: Segments
    pieces: Sequence[tuple[int, bytes]]
    nbytes: int
    offsets: Mapping[str, int]
    moved: bool


def plan_data(path: Path, tensors: Sequence[TensorRange], patches: Mapping[str, PartPatch]) -> DataPatch:
    """Lay out the data file at ``path``, which holds ``tensors``. Raises NotExpressible for tensors that overlap."""
    size = path.stat().st_size
    placed = {one.name: one.place.offset_bytes for one in tensors if one.place}
    if not any(one.grows for one in patches.values()):
        pieces = [piece for name, one in patches.items() for piece in one.pieces(placed[name])]
        return DataPatch(path, [ByteRange(path, 0, size)], pieces, size, placed, moved=False)
    order = sorted(tensors, key=lambda one: placed[one.name])
    for one, other in pairwise(order):
        if placed[one.name] + one.nbytes > placed[other.name]:
            reason = f"{one.name} and {other.name} share bytes of it, and the vocabulary grows"
            raise NotExpressible(str(path), reason, instead="ttexport merge ADAPTER --to onnx writes the folder anew")
    ours = _is_ours(order, placed, size)
    segments = list(_ours(order, patches) if ours else _shifted(path, order, placed, patches, size))
    offsets: dict[str, int] = {}
    at = 0
    for name, segment in segments:
        if name is not None:
            offsets.setdefault(name, at)
        at += len(segment) if isinstance(segment, bytes) else segment.nbytes
    pieces = [piece for name, one in patches.items() for piece in one.pieces(offsets[name])]
    return DataPatch(path, [segment for _, segment in segments], pieces, at, offsets, moved=True)


def _is_ours(order: Sequence[TensorRange], placed: Mapping[str, int], size: int) -> bool:
    """Whether the tensors lie as our own writer places them."""
    end = 0
    for one in order:
        if placed[one.name] != aligned(end, one.nbytes):
            return False
        end = placed[one.name] + one.nbytes
    return end == size


_Named = tuple[str | None, ByteRange | Array | bytes]


def _ours(order: Sequence[TensorRange], patches: Mapping[str, PartPatch]) -> Iterator[_Named]:
    """Every tensor where our writer would place it."""
    end = 0
    for one in order:
        patch = patches.get(one.name)
        nbytes = patch.nbytes if patch else one.nbytes
        start = aligned(end, nbytes)
        yield None, bytes(start - end)
        yield from _tensor(one, patch)
        end = start + nbytes


def _shifted(
    path: Path, order: Sequence[TensorRange], placed: Mapping[str, int], patches: Mapping[str, PartPatch], size: int
) -> Iterator[_Named]:
    """Everything as it lies, gaps too, behind a grown tensor by so much later that every alignment is kept."""
    at = 0
    for one in order:
        start = placed[one.name]
        if at < start:
            yield None, ByteRange(path, at, start - at)
        patch = patches.get(one.name)
        yield from _tensor(one, patch)
        if patch:
            yield None, bytes(-(patch.nbytes - one.nbytes) % _STEP_BYTES)
        at = start + one.nbytes
    if at < size:
        yield None, ByteRange(path, at, size - at)


def _tensor(one: TensorRange, patch: PartPatch | None) -> Iterator[_Named]:
    if patch and patch.grows:
        yield from ((one.name, segment) for segment in patch.segments())
    elif one.place and one.nbytes:
        yield one.name, one.place
    else:
        yield one.name, b""
