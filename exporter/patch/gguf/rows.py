"""The vocabulary matrices of a GGUF, as patching sees them."""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np

from exporter.errors import NotExpressible, UnreadableFile
from exporter.patch.rows import Matrices, sample
from exporter.sources.gguf.split_files import GgufModel

EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"


def matrices(parts: GgufModel) -> Matrices:
    """Raises UnreadableFile for a file without an embedding, NotExpressible for one that is no matrix."""
    if EMBEDDING not in parts.tensors:
        raise UnreadableFile(parts.path, f"{EMBEDDING}: expected an input embedding, found none")
    names = [name for name in (EMBEDDING, HEAD) if name in parts.tensors]
    for name in names:
        if len(shape := parts.tensors[name].shape) != 2:
            raise NotExpressible(f"{parts.path}: {name}", f"shape {shape}: rows are replaced in matrices alone")
    head = HEAD if HEAD in names else None
    widths = {name: parts.tensors[name].shape[-1] for name in names}
    return Matrices(parts.path, "gguf", EMBEDDING, head, widths, partial(_repeats, parts))


def _repeats(parts: GgufModel) -> bool:
    """Whether the head is a stored copy of the embedding, as some converters write it for tied models."""
    one, other = parts.tensors[EMBEDDING], parts.tensors[HEAD]
    if (one.type, one.shape) != (other.type, other.shape):
        return False
    files = parts.holder(EMBEDDING), parts.holder(HEAD)
    return all(
        np.array_equal(files[0].rows(EMBEDDING, row, row + 1), files[1].rows(HEAD, row, row + 1))
        for row in sample(one.n_rows)
    )
