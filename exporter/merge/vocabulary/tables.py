"""Grows biases and additional embeddings, which also have one entry per token, when the embedding grows.

New rows of an additional embedding, such as Gemma's per-layer embeddings, must come from an adapter. New bias entries
have the same values as after ``resize_token_embeddings`` in transformers: zero in ``final_logits_bias`` and in the bias
of a tied head, and the mean of the old entries in the bias of a separate head. Sources: ``_resize_final_logits_bias``,
``_adjust_bias`` and ``_init_added_lm_head_bias_with_mean`` in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from exporter.errors import BadInput, NotExpressible
from exporter.merge.changes import Change
from exporter.merge.passes import AppendColumns, Pass, ReplaceRows
from exporter.merge.vocabulary.tokens import rows_after
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.hf.tables import TokenTable, described_keys, token_tables
from exporter.sources.hf.tokenizer import Tokenizer
from exporter.sources.peft.edits import TokenRows
from exporter.tensors import cast, read

Sources = Mapping[str, tuple[str, Change]]


def grown_tables(checkpoint: Checkpoint, sources: Sources, vocab: int) -> list[TokenTable]:
    """Return the additional embeddings and biases that must grow, or be reduced, to ``vocab`` entries.

    sources: maps the name of each output tensor to the pair (name of the base tensor to change, changes). Raises
    BadInput if an additional embedding must grow and no adapter contains the new rows. Raises NotExpressible if the
    config has no key for the number of rows.
    """
    if not any(
        rows_after(checkpoint, name, *sources[name], vocab) != checkpoint.tensors[name].spec.n_rows
        for name in checkpoint.tie.names
    ):
        return []
    if checkpoint.modules is not None and not described_keys(checkpoint):
        raise NotExpressible(
            f"{checkpoint.path}: {checkpoint.tie.embedding}",
            "the model class computes the number of embedding rows from other settings, so no rows can be added",
            instead="train only rows of tokens that the base already has",
        )
    _require_one_vocabulary(checkpoint)
    grown = []
    shrinks = vocab < checkpoint.tensors[checkpoint.tie.embedding].spec.n_rows
    for table in token_tables(checkpoint):
        _, change = sources[table.name]
        shape = (change.replaced.tensor if change.replaced else checkpoint.tensors[table.name]).spec.shape
        if shrinks and shape[table.axis] > vocab:
            if table.axis == 1:
                raise NotExpressible(f"{checkpoint.path}: {table.name}", "ttexport does not remove columns of a table")
            grown.append(table)
        elif not shrinks and shape[table.axis] < vocab:
            _require_rows(checkpoint, table, change, shape, vocab)
            grown.append(table)
    return grown


def padded(checkpoint: Checkpoint, sources: Sources, vocab: int, tokenizer: Tokenizer | None) -> Sources:
    """Return ``sources`` with new rows of zeros in the additional embeddings, for new ids that belong to no token.

    New ids belong to no token if the vocabulary size was rounded up, for example to a multiple of 64. The adapter file
    may lack rows for ids that belong to no token, and the model never reads these rows. Without a tokenizer,
    ``sources`` is returned unchanged, because every id may belong to a token.
    """
    if tokenizer is None or vocab <= checkpoint.tensors[checkpoint.tie.embedding].spec.n_rows:
        return sources
    changed = dict(sources)
    for table in token_tables(checkpoint):
        stored, change = sources[table.name]
        spec = (change.replaced.tensor if change.replaced else checkpoint.tensors[table.name]).spec
        covered = {token_id for edit in change.rows for token_id in edit.token_ids} | tokenizer.ids
        ids = tuple(token_id for token_id in range(spec.shape[0], vocab) if token_id not in covered)
        if table.axis == 0 and len(spec.shape) == 2 and ids:
            zeros = np.zeros((len(ids), spec.shape[1]), np.float32)
            module = table.parameter.removesuffix(".weight")
            rows = TokenRows(checkpoint.path, table.name, module, ids, zeros, untrained=frozenset(ids))
            changed[table.name] = stored, replace(change, rows=(*change.rows, rows))
    return changed


def _require_one_vocabulary(checkpoint: Checkpoint) -> None:
    """Raise NotExpressible if embedding and head have separate vocabularies, because a new token would need two ids."""
    modules = checkpoint.modules
    if modules is None or modules.architecture.head is None:
        return
    keys = {name: key for name, _, key in modules.architecture.tables}
    embedding, head = (
        keys.get(f"{path}.weight") for path in (modules.architecture.embedding, modules.architecture.head)
    )
    if embedding and head and embedding != head:
        raise NotExpressible(
            f"{checkpoint.path}: {embedding}, {head}",
            "embedding and head have separate vocabularies, so an added token would need two ids",
            instead="train only rows of tokens that the base already has",
        )


def _require_rows(checkpoint: Checkpoint, table: TokenTable, change: Change, shape: Sequence[int], vocab: int) -> None:
    if len(shape) < 2 or table.axis != 0:
        return
    covered = {token_id for edit in change.rows for token_id in edit.token_ids}
    missing = next((token_id for token_id in range(shape[0], vocab) if token_id not in covered), None)
    if missing is not None:
        module = table.parameter.removesuffix(".weight")
        raise BadInput(
            f"{checkpoint.path}: {table.name}: expected the adapters to set the new rows {shape[0]} to {vocab - 1} of "
            f"this additional embedding, found no row for token {missing}; add {module.rpartition('.')[2]!r} to "
            "trainable_token_indices to train these rows, or train on a base with the new tokens"
        )


def growth(table: TokenTable, source: FileTensor, dtype: str, vocab: int, *, tied: bool) -> list[Pass]:
    """Return the merge steps that append the new entries to the bias ``source``.

    tied: whether the base ties embedding and head. For a separate head, the function reads the bias to compute the
    mean. Returns [] for an additional embedding, because its new rows come from an adapter, and for a bias that must
    not grow.
    """
    shape = source.spec.shape
    if table.axis == 1:
        return [AppendColumns(vocab - shape[1])]
    if len(shape) > 1 or shape[0] > vocab:
        return []
    mean = np.float32(0) if tied else np.float32(cast(read(source), "F32").mean(dtype=np.float32))
    ids = tuple(range(shape[0], vocab))
    return [ReplaceRows(ids, cast(np.full(len(ids), mean, np.float32), dtype), vocab)]
