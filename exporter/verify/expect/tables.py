"""Extend expected tensors that have one entry per token, such as output biases, if tuning grows the vocabulary.

The added values are those of ``resize_token_embeddings`` in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.tables import replaced_biases, token_tables
from exporter.sources.hf.tokenizer import token_ids
from exporter.sources.peft.adapter import Adapter
from exporter.tensors import read
from exporter.verify.expect.expected import Expected


def grow_tables(checkpoint: Checkpoint, adapters: Sequence[Adapter], wanted: dict[str, Expected]) -> None:
    """Extend output biases by zeros or the mean bias, and embeddings by rows of zeros for unused token ids.

    A token id is unused if no tokenizer contains a token with this id, as happens if the vocabulary size was rounded
    up.
    """
    vocab, base = wanted[checkpoint.tie.embedding].n_rows, checkpoint.tensors[checkpoint.tie.embedding].spec.n_rows
    if vocab == base:
        return
    for name, bias in replaced_biases(checkpoint).items():
        full = wanted[bias].full
        # The head that PEFT trains through modules_to_save is a copy, whose bias replaces no other parameter.
        wanted[name] = Expected(wanted[bias].base) if full and not full.in_place else wanted[bias]
    if vocab < base:
        _reduce(checkpoint, wanted, vocab)
        return
    for table in token_tables(checkpoint):
        want = wanted[table.name]
        shape = want.source.spec.shape
        if table.axis == 1:
            want.zero_columns = vocab - shape[1]
        elif len(shape) == 1:
            mean = 0.0 if checkpoint.tie.tied else read(want.source).astype(np.float32).mean(dtype=np.float64)
            want.rows |= {token_id: np.asarray(mean) for token_id in range(shape[0], vocab)}
        elif unused := set(range(shape[0], vocab)) - want.rows.keys() - _tokens(checkpoint, adapters):
            want.rows |= {token_id: np.zeros(shape[1]) for token_id in unused}


def _reduce(checkpoint: Checkpoint, wanted: Mapping[str, Expected], vocab: int) -> None:
    """Keep only the first ``vocab`` entries of the head and of the tables, as ``resize_token_embeddings`` does."""
    names = {*checkpoint.tie.names, *(table.name for table in token_tables(checkpoint) if table.axis == 0)}
    for name in names & wanted.keys():
        if wanted[name].n_rows > vocab:
            wanted[name].kept = vocab


def _tokens(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> set[int]:
    """Return the ids of all tokens in the tokenizers of base and adapters."""
    folders = (checkpoint.auxiliary_files, *(adapter.auxiliary_files for adapter in adapters))
    files = [folder["tokenizer.json"] for folder in folders if "tokenizer.json" in folder]
    return set().union(*map(token_ids, files))
