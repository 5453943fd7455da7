"""Reads the variable-length integers (varints) of protobuf messages. Source: protobuf's encoding guide."""

from __future__ import annotations

import mmap
from collections.abc import Sequence


def read_varint(data: Sequence[int] | mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """Read the varint at the offset ``at`` and return (value, offset of the byte after the varint).

    Raises ValueError if the varint extends past the offset ``end`` or is longer than 10 bytes.
    """
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("expected a varint of at most 10 bytes, found a truncated or longer varint")
