"""Where an initialiser begins in a data file of ours."""

from __future__ import annotations

from typing import Final

#: Runtimes map the data file: a matrix that begins on a page shares none with its neighbour.
_PAGE_BYTES: Final = 4096
_PAGED_FROM_BYTES: Final = 64 << 10
#: Small tensors begin on a cache line.
_LINE_BYTES: Final = 64


def aligned(end_bytes: int, nbytes: int) -> int:
    """The first offset from ``end_bytes``, where the tensor before ends, at which one of ``nbytes`` may begin."""
    alignment = _PAGE_BYTES if nbytes >= _PAGED_FROM_BYTES else _LINE_BYTES
    return end_bytes + -end_bytes % alignment
