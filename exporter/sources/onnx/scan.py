"""Checks, before an ONNX file is parsed, that the parsed protobuf messages will not need too much memory.

The check is necessary because two bytes of a protobuf file may be parsed to a message object of hundreds of bytes. The
scan visits only the fields that can contain many nested messages, and skips tensor values. Sources: the protobuf
encoding guide, and the field numbers in onnx.proto3.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, Final

from exporter.errors import UnreadableFile
from exporter.sources.varint import read_varint

#: Limits on fields and on bytes that are not raw weights. The graph of a large model, unrolled by an exporter, has
#: about 100,000 fields and 10 MB of names and traces.
_MAX_FIELDS: Final = 1 << 19
_MAX_LOOSE_BYTES: Final = 64 << 20
#: Memory of one number. In a message that packs numbers, a single byte may encode a number.
_NUMBER_BYTES: Final = 8

#: For every message: field number → nested message. Only the raw bytes of a tensor may be large.
_RAW: Final[dict[int, Any]] = {}
_TENSOR: Final[dict[int, Any]] = {9: _RAW, 13: {}}
_GRAPH: Final[dict[int, Any]] = {}
_ATTRIBUTE: Final[dict[int, Any]] = {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 14: {}, 15: {}, 22: {}, 23: {}}
_NODE: Final[dict[int, Any]] = {5: _ATTRIBUTE, 9: {}}
_SPARSE: Final[dict[int, Any]] = {1: _TENSOR, 2: _TENSOR}
_GRAPH.update({1: _NODE, 5: _TENSOR, 11: {}, 12: {}, 13: {}, 14: {}, 15: _SPARSE, 16: {}})
_FUNCTION: Final[dict[int, Any]] = {7: _NODE, 9: {}, 11: _ATTRIBUTE, 12: {}, 14: {}}
_TRAINING: Final[dict[int, Any]] = {1: _GRAPH, 2: _GRAPH, 3: {}, 4: {}}
_MODEL: Final[dict[int, Any]] = {7: _GRAPH, 8: {}, 14: {}, 20: _TRAINING, 25: _FUNCTION}


def check_cost(path: Path, view: mmap.mmap) -> None:
    """Raise UnreadableFile if the bytes are not valid protobuf, or if they contain too many messages or names.

    The scan skips the bytes of the weights.
    """
    waiting: list[tuple[int, int, dict[int, Any]]] = [(0, len(view), _MODEL)]
    n_fields = loose = 0
    while waiting:
        at, end, known = waiting.pop()
        while at < end:
            tag, at = _varint(path, view, at, end)
            number, wire = tag >> 3, tag & 7
            n_fields += 1
            length = 0
            if wire == 2:
                length, at = _varint(path, view, at, end)
            elif wire == 0:
                _, at = _varint(path, view, at, end)
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            if number == 0 or wire not in (0, 1, 2, 5) or length > end - at:
                raise UnreadableFile(path, f"expected an ONNX model, found invalid protobuf at byte {at}")
            below = known.get(number) if wire == 2 else None
            if below is None:
                loose += length * (_NUMBER_BYTES if known is _TENSOR or known is _ATTRIBUTE else 1)
            elif below is not _RAW:
                waiting.append((at, at + length, below))
            if n_fields > _MAX_FIELDS or loose > _MAX_LOOSE_BYTES:
                raise UnreadableFile(
                    path,
                    f"expected at most {_MAX_FIELDS} protobuf fields and {_MAX_LOOSE_BYTES} bytes without "
                    "the raw weights, found a larger model",
                )
            at += length


def _varint(path: Path, view: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    try:
        return read_varint(view, at, end)
    except ValueError as exc:
        raise UnreadableFile(path, f"expected an ONNX model, found invalid protobuf at byte {at}") from exc
