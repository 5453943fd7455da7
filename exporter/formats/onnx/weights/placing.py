"""The offset of an initialiser in a data file."""

from __future__ import annotations

from typing import Final

#: Runtimes map the data file: a matrix that begins on a page boundary shares no page with the tensor before it.
_PAGE_BYTES: Final = 4096
_PAGED_FROM_BYTES: Final = 64 << 10
#: Small tensors begin on a cache line boundary.
_LINE_BYTES: Final = 64


def aligned(end_bytes: int, nbytes: int) -> int:
    """The offset of a tensor of ``nbytes`` after a tensor that ends at ``end_bytes``."""
    alignment = _PAGE_BYTES if nbytes >= _PAGED_FROM_BYTES else _LINE_BYTES
    return end_bytes + -end_bytes % alignment
