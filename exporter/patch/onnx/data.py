"""Plans the patch of an ONNX external data file: the bytes to overwrite, or new tensor offsets if tensors grow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from exporter.formats.onnx.weights.placing import aligned
from exporter.patch.onnx.initialiser import InitialiserPatch
from exporter.patch.onnx.refusal import refusal
from exporter.sources.onnx.tensors import TensorRange
from exporter.tensors import Array, ByteRange

#: Tensors move by multiples of this number of bytes, because tools align tensors to pages or to Windows' mapping unit.
_STEP_BYTES: Final = 64 << 10

_Segment = ByteRange | Array | bytes
#: (name of the segment's tensor, or None for a gap; segment)
_NamedSegment = tuple[str | None, _Segment]


@dataclass(frozen=True)
class DataPatch:
    """The planned patch of one external data file.

    segments: byte ranges of the old file and new bytes which, joined in order, form a file of the patched size. pieces:
    pairs (offset, bytes) to write into that file afterwards. offsets: maps the name of each tensor to its offset after
    patching. moved: whether a tensor grows, so that the offsets of all later tensors change.
    """

    path: Path
    segments: Sequence[_Segment]
    pieces: Sequence[tuple[int, bytes]]
    nbytes: int
    offsets: Mapping[str, int]
    moved: bool


def plan_data(path: Path, tensors: Sequence[TensorRange], patches: Mapping[str, InitialiserPatch]) -> DataPatch:
    """Plan the patch of the external data file ``path``, which contains ``tensors``.

    patches: maps the name of each patched initialiser to its patch. Raises NotExpressible if the external data file
    grows and contains overlapping tensors.
    """
    size = path.stat().st_size
    placed = {tensor.name: tensor.place.offset_bytes for tensor in tensors if tensor.place}
    if not any(patch.grows for patch in patches.values()):
        pieces = [piece for name, patch in patches.items() for piece in patch.pieces(placed[name])]
        return DataPatch(path, [ByteRange(path, 0, size)], pieces, size, placed, moved=False)
    order = sorted(tensors, key=lambda tensor: placed[tensor.name])
    for tensor, following in pairwise(order):
        if placed[tensor.name] + tensor.nbytes > placed[following.name]:
            names = f"{tensor.name} and {following.name}"
            raise refusal(path, f"the vocabulary grows, but the overlapping tensors {names} cannot be moved")
    ours = _is_ours(order, placed, size)
    segments = list(_ours(order, patches) if ours else _shifted(path, order, placed, patches, size))
    offsets: dict[str, int] = {}
    at = 0
    for name, segment in segments:
        if name is not None:
            offsets.setdefault(name, at)
        at += len(segment) if isinstance(segment, bytes) else segment.nbytes
    pieces = [piece for name, patch in patches.items() for piece in patch.pieces(offsets[name])]
    return DataPatch(path, [segment for _, segment in segments], pieces, at, offsets, moved=True)


def _is_ours(order: Sequence[TensorRange], placed: Mapping[str, int], size: int) -> bool:
    """Whether the offsets of all tensors are equal to the offsets that ttexport's own ONNX writer would choose."""
    end = 0
    for tensor in order:
        if placed[tensor.name] != aligned(end, tensor.nbytes):
            return False
        end = placed[tensor.name] + tensor.nbytes
    return end == size


def _ours(order: Sequence[TensorRange], patches: Mapping[str, InitialiserPatch]) -> Iterator[_NamedSegment]:
    """Yield the content of the patched file, with tensors at the offsets that ttexport's ONNX writer would choose."""
    end = 0
    for tensor in order:
        patch = patches.get(tensor.name)
        nbytes = patch.nbytes if patch else tensor.nbytes
        start = aligned(end, nbytes)
        yield None, bytes(start - end)
        yield from _content(tensor, patch)
        end = start + nbytes


def _shifted(
    path: Path,
    order: Sequence[TensorRange],
    placed: Mapping[str, int],
    patches: Mapping[str, InitialiserPatch],
    size: int,
) -> Iterator[_NamedSegment]:
    """Yield the content of the patched file: all tensors and the bytes between tensors, in the order of the old file.

    Padding bytes after a tensor that grows keep all later tensors aligned.
    """
    at = 0
    for tensor in order:
        start = placed[tensor.name]
        if at < start:
            yield None, ByteRange(path, at, start - at)
        patch = patches.get(tensor.name)
        yield from _content(tensor, patch)
        if patch:
            yield None, bytes(-(patch.nbytes - tensor.nbytes) % _STEP_BYTES)
        at = start + tensor.nbytes
    if at < size:
        yield None, ByteRange(path, at, size - at)


def _content(tensor: TensorRange, patch: InitialiserPatch | None) -> Iterator[_NamedSegment]:
    if patch and patch.grows:
        yield from ((tensor.name, segment) for segment in patch.segments())
    elif tensor.place and tensor.nbytes:
        yield tensor.name, tensor.place
    else:
        yield tensor.name, b""
