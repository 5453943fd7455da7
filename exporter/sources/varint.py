"""Reads variable-length integers of protobuf messages. Source: protobuf's encoding guide."""

from __future__ import annotations

import mmap
from collections.abc import Sequence


def read_varint(data: Sequence[int] | mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """(value, offset of the next byte) of the varint at ``at``.

    Raises ValueError if the varint exceeds ``end`` or is longer than 10 bytes.
    """
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a varint that is cut short or longer than 10 bytes")
