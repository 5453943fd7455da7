"""Determines the number of rows of embedding and head after merging.

The tokenizer, the token rows and the matrices must be consistent with that number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping

from exporter.errors import BadInput, NotExpressible, TensorMismatch
from exporter.merge.changes import Change
from exporter.sources.hf.checkpoint import Checkpoint, Tie
from exporter.sources.hf.tokenizer import Tokenizer


def vocabulary(
    checkpoint: Checkpoint, tie: Tie, sources: Mapping[str, tuple[str, Change]], tokenizer: Tokenizer | None
) -> int:
    """Return the number of rows of the merged embedding.

    sources: maps the names of the embedding and head tensors to write to (name of the stored tensor, changes). Raises
    TensorMismatch if the id of a token row is neither a row of the stored matrix nor an id of the tokenizer. Raises
    BadInput if no adapter sets a row that has to be added, or if a token of the tokenizer has no row. Raises
    NotExpressible if new rows would require a longer bias of the head.
    """
    n_tokens = max(tokenizer.ids, default=-1) + 1 if tokenizer else 0
    n_rows = {name: _n_rows(checkpoint, *source) for name, source in sources.items()}
    largest = max(n_rows.values())
    vocab = largest
    for name, (_, change) in sources.items():
        for edit in change.rows:
            if edit.token_ids[-1] >= max(largest, n_tokens):
                expected = f"token ids below {max(largest, n_tokens)}, the number of rows of {name}"
                hint = "the folder of an adapter with new tokens must contain the tokenizer with the new tokens"
                raise TensorMismatch(edit.path, edit.key, expected=expected, found=edit.token_ids[-1], hint=hint)
            vocab = max(vocab, edit.token_ids[-1] + 1)
    if tokenizer and n_tokens > vocab:
        raise BadInput(
            f"{tokenizer.path}: expected token ids below {vocab}, the number of rows of {tie.embedding}, "
            f"found {n_tokens - 1}"
        )
    for name in sorted(sources):
        covered = {token_id for edit in sources[name][1].rows for token_id in edit.token_ids}
        missing = next((token_id for token_id in range(n_rows[name], vocab) if token_id not in covered), None)
        if missing is not None:
            raise BadInput(
                f"{checkpoint.path}: {name}: expected the adapters to set the new rows {n_rows[name]} to {vocab - 1}, "
                f"found no row for token {missing}"
            )
    _require_no_bias(checkpoint, vocab)
    _require_stored_head(checkpoint, vocab, sources)
    return vocab


def _n_rows(checkpoint: Checkpoint, stored: str, change: Change) -> int:
    tensor = change.replaced.tensor if change.replaced else checkpoint.tensors[stored]
    return tensor.spec.n_rows


def _require_no_bias(checkpoint: Checkpoint, vocab: int) -> None:
    """Refuse a new vocabulary size if the logits have a bias, because adapters contain no bias for new tokens."""
    stored = checkpoint.tensors[checkpoint.tie.embedding].spec.n_rows
    for name, tensor in checkpoint.tensors.items():
        if vocab != stored and name.endswith(("lm_head.bias", "embed_out.bias", "final_logits_bias")):
            raise NotExpressible(
                f"{tensor.place.path}: {name}",
                f"the vocabulary changes from {stored} to {vocab} tokens, but no adapter contains bias for new tokens",
                instead="resize the base with transformers and train the adapter on the resized base",
            )


def _require_stored_head(checkpoint: Checkpoint, vocab: int, sources: Mapping[str, tuple[str, Change]]) -> None:
    """Refuse a stored head whose values differ from the embedding although the config ties embedding and head.

    When transformers resizes the vocabulary of a model whose config ties embedding and head, transformers discards the
    stored head and uses the embedding as head.
    """
    tie = checkpoint.tie
    head = sources[tie.head][1] if tie.head is not None and tie.head in sources else Change()
    grown = vocab != checkpoint.tensors[tie.embedding].spec.n_rows
    if grown and tie.tied_in_config and not tie.tied and head.replaced is None:
        raise NotExpressible(
            f"{checkpoint.path}: {tie.head}",
            "the stored head differs from the embedding although the config ties embedding and head, "
            "and transformers discards the stored head when resizing the vocabulary",
            instead="save the resized base with transformers and train the adapter on the saved base",
        )
