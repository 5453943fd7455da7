"""Determines the number of rows of embedding and head after merging.

Raises an error if the tokenizer contains an id without a row, or if an added row has no values.
"""

from __future__ import annotations

from collections.abc import Mapping

from exporter.errors import BadInput, NotExpressible, TensorMismatch
from exporter.merge.changes import Change
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.tie import Tie
from exporter.sources.hf.tokenizer import Tokenizer


def vocabulary(
    checkpoint: Checkpoint,
    tie: Tie,
    sources: Mapping[str, tuple[str, Change]],
    tokenizer: Tokenizer | None,
    *,
    drop_unused: bool = False,
) -> int:
    """Return the number of rows of the merged embedding.

    sources: maps the name of the output embedding and of the output head to the pair (name of the base tensor to
    change, changes). drop_unused: whether the caller leaves out tokens without a row. Raises TensorMismatch if the
    stored matrix has no row, and the tokenizer no token, for the id of a token row. Raises BadInput if no adapter
    contains the values of an added row, or if the embedding has no row for a token of the tokenizer. Raises
    NotExpressible if the vocabulary grows and transformers would discard the stored head.
    """
    n_tokens = max(tokenizer.ids, default=-1) + 1 if tokenizer else 0
    n_rows = {name: _n_rows(checkpoint, *source) for name, source in sources.items()}
    largest = vocab = _shrunk(checkpoint, sources) or max(n_rows.values())
    for name, (_, change) in sources.items():
        for edit in change.rows:
            if edit.token_ids[-1] >= max(largest, n_tokens):
                expected = f"token ids below {max(largest, n_tokens)}, the number of rows of {name}"
                hint = "the folder of an adapter with new tokens must contain the tokenizer with the new tokens"
                raise TensorMismatch(edit.path, edit.key, expected=expected, found=edit.token_ids[-1], hint=hint)
            vocab = max(vocab, edit.token_ids[-1] + 1)
    if tokenizer and n_tokens > vocab and not drop_unused:
        (token_id, text), *others = tokenizer.texts_from(vocab).items()
        more = f" and {len(others)} more without a row" if others else ""
        raise BadInput(
            f"{tokenizer.path}: expected token ids below {vocab}, the number of rows of {tie.embedding}, "
            f"found {token_id} for the token {text!r}{more}; use --drop-unused-tokens to leave out such tokens, or "
            f"train their rows, for example with ttexport tune --new-token {text!r}"
        )
    for name in sorted(sources):
        covered = {token_id for edit in sources[name][1].rows for token_id in edit.token_ids}
        size = rows_after(checkpoint, name, *sources[name], vocab)
        missing = next((token_id for token_id in range(n_rows[name], size) if token_id not in covered), None)
        if missing is not None:
            raise BadInput(
                f"{checkpoint.path}: {name}: expected the adapters to set the new rows {n_rows[name]} to {vocab - 1}, "
                f"found no row for token {missing}"
            )
    _require_stored_head(checkpoint, vocab, sources)
    return vocab


def _shrunk(checkpoint: Checkpoint, sources: Mapping[str, tuple[str, Change]]) -> int:
    """Return the number of rows of a vocabulary that the user reduced before training, else 0.

    ``resize_token_embeddings`` reduces embedding and head together. An adapter that was trained on the embedding alone
    may contain only the reduced embedding.
    """
    resized = [
        change.replaced.tensor.spec.n_rows
        for stored, change in sources.values()
        if change.replaced
        and change.replaced.in_place
        and change.replaced.tensor.spec.n_rows != checkpoint.tensors[stored].spec.n_rows
    ]
    n_rows = max(resized, default=0)
    return n_rows if n_rows < checkpoint.tensors[checkpoint.tie.embedding].spec.n_rows else 0


def rows_after(checkpoint: Checkpoint, name: str, stored: str, change: Change, vocab: int) -> int:
    """Return the number of rows of the embedding or head ``name`` after merging.

    In some models, the embedding has more rows than the head; the additional rows are for tokens that the model never
    generates. If the base's embedding and head have different numbers of rows, each matrix grows only as far as the
    adapters contain rows for that matrix.
    """
    own = _n_rows(checkpoint, stored, change)
    base, embedding = checkpoint.tensors.get(name), checkpoint.tensors[checkpoint.tie.embedding]
    if base is None or base.spec.n_rows == embedding.spec.n_rows:
        return vocab
    return max([own, *(edit.token_ids[-1] + 1 for edit in change.rows)])


def _n_rows(checkpoint: Checkpoint, stored: str, change: Change) -> int:
    tensor = change.replaced.tensor if change.replaced else checkpoint.tensors[stored]
    return tensor.spec.n_rows


def _require_stored_head(checkpoint: Checkpoint, vocab: int, sources: Mapping[str, tuple[str, Change]]) -> None:
    """Raise NotExpressible if the vocabulary grows, the config ties embedding and head, and the stored head differs.

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
