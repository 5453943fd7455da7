"""Compute the offsets of initialisers in an ONNX external data file."""

from __future__ import annotations

from typing import Final

#: Alignment of large tensors. Runtimes map the data file, so page boundaries keep a matrix's pages separate.
_PAGE_BYTES: Final = 4096
_PAGED_FROM_BYTES: Final = 64 << 10
#: Alignment of small tensors: the size of a cache line.
_LINE_BYTES: Final = 64


def aligned(end_bytes: int, nbytes: int) -> int:
    """Return the aligned offset of a tensor of ``nbytes`` bytes that follows a tensor ending at ``end_bytes``."""
    alignment = _PAGE_BYTES if nbytes >= _PAGED_FROM_BYTES else _LINE_BYTES
    return end_bytes + -end_bytes % alignment
