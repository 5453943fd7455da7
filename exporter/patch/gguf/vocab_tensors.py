"""Finds the embedding and LM head matrices of a GGUF model."""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np

from exporter.errors import NotExpressible, UnreadableFile
from exporter.patch.evidence import sample
from exporter.patch.rows import VocabTensors
from exporter.sources.gguf.split_files import GgufModel

EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"


def vocab_tensors(model: GgufModel) -> VocabTensors:
    """Return the names and widths of the embedding and LM head of ``model``.

    Raises UnreadableFile if the model has no embedding. Raises NotExpressible if a vocabulary tensor is not a matrix.
    """
    if EMBEDDING not in model.tensors:
        raise UnreadableFile(model.path, f"{EMBEDDING}: expected an input embedding, found no such tensor")
    names = [name for name in (EMBEDDING, HEAD) if name in model.tensors]
    for name in names:
        if len(shape := model.tensors[name].shape) != 2:
            raise NotExpressible(
                f"{model.path}: {name}", f"expected a matrix with one row per token, found a tensor of shape {shape}"
            )
    head = HEAD if HEAD in names else None
    widths = {name: model.tensors[name].shape[-1] for name in names}
    return VocabTensors(model.path, "gguf", EMBEDDING, head, widths, partial(_repeats, model))


def _repeats(model: GgufModel) -> bool:
    """Whether the stored LM head is a copy of the embedding, which some converters write for tied models."""
    embedding, head = model.tensors[EMBEDDING], model.tensors[HEAD]
    if (embedding.type, embedding.shape) != (head.type, head.shape):
        return False
    files = model.holder(EMBEDDING), model.holder(HEAD)
    return all(
        np.array_equal(files[0].rows(EMBEDDING, row, row + 1), files[1].rows(HEAD, row, row + 1))
        for row in sample(embedding.n_rows)
    )
