"""Assigns the token rows of adapters to the embedding and the LM head of a base artifact.

A token row is the trained vector of one token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, TypeVar

import numpy as np

from exporter.errors import BadInput, NotExpressible, TensorMismatch, in_tensor
from exporter.sources.hf.tie import EMBEDDINGS, HEADS
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import Edit, FullModule, TokenRows
from exporter.tensors import Array, cast

_EMBEDDING: Final = "embedding"
_HEAD: Final = "head"

_Encoded = TypeVar("_Encoded")


@dataclass(frozen=True)
class VocabTensors:
    """Names of the vocabulary tensors (embedding and LM head) of a base artifact.

    head: name of the LM head, or None if the embedding is also used as the LM head. widths: maps each tensor name to
    the tensor's hidden size. repeats: function that returns whether a stored LM head is a second copy of the embedding.
    Calling ``repeats`` reads rows of the artifact.
    """

    path: Path
    format: str
    embedding: str
    head: str | None
    widths: Mapping[str, int]
    repeats: Callable[[], bool]

    @property
    def names(self) -> list[str]:
        """Names of the vocabulary tensors, starting with the embedding."""
        return [self.embedding, *([self.head] if self.head else [])]


@dataclass(frozen=True)
class RowEdits:
    """The token rows that a patch sets in the vocabulary tensors of a base artifact.

    rows: maps the name of each base tensor to a dict from token id to the new row (hidden,) in the trained dtype.
    sources: maps the name of each base tensor to an adapter tensor with new rows, for error messages. untrained: ids of
    the tokens whose rows were added by resizing the embedding and left unchanged by training.
    """

    rows: Mapping[str, Mapping[int, Array]]
    sources: Mapping[str, TokenRows]
    untrained: frozenset[int] = frozenset()

    @property
    def highest(self) -> int:
        """The highest token id of any new row."""
        return max(self._token_ids)

    @property
    def highest_trained(self) -> int:
        """The highest token id of a trained row, or -1 if no row is trained.

        Unlike an untrained row, a trained row must belong to a token of the tokenizer.
        """
        return max(self.trained, default=-1)

    @property
    def trained(self) -> set[int]:
        """The token ids of all trained rows."""
        return self._token_ids - self.untrained

    @property
    def _token_ids(self) -> set[int]:
        return {token_id for rows in self.rows.values() for token_id in rows}

    def require_covered(self, path: Path, name: str, n_rows: int, vocab: int) -> None:
        """Raise BadInput if the adapters do not set all rows from ``n_rows`` to ``vocab`` - 1 of tensor ``name``."""
        covered = self.rows.get(name, {}).keys()
        missing = next((token_id for token_id in range(n_rows, vocab) if token_id not in covered), None)
        if missing is not None:
            raise BadInput(
                f"{path}: {name}: expected the adapters to set every new row from {n_rows} to {vocab - 1}, "
                f"found no row for token {missing}"
            )

    def encode(self, name: str, dtype: str, encoder: Callable[[Array], _Encoded]) -> tuple[tuple[int, ...], _Encoded]:
        """Encode all new rows of the tensor ``name``. Returns (ascending token ids, encoded rows).

        encoder: function that encodes an array (number of rows, hidden size) of values in ``dtype``. Raises
        TensorMismatch if a value exceeds the range of ``dtype``. If ``encoder`` raises BadInput, the name of the
        adapter tensor is added to the error message.
        """
        rows, source = self.rows[name], self.sources[name]
        token_ids = tuple(sorted(rows))
        values = np.stack([cast(rows[token_id], dtype) for token_id in token_ids])
        finite = np.isfinite(values.astype(np.float32)).all(axis=1)
        if not finite.all():
            actual = f"a value out of range in the row of token {token_ids[int(np.flatnonzero(~finite)[0])]}"
            raise TensorMismatch(source.path, source.key, expected=f"values in the range of {dtype}", found=actual)
        with in_tensor(source.path, source.key):
            return token_ids, encoder(values)


def collect_rows(base: VocabTensors, adapters: Sequence[Adapter]) -> RowEdits:
    """Assign the adapters' token rows to the base's vocabulary tensors.

    Raises NotExpressible if an adapter contains weights other than token rows, or if an adapter's rows for embedding
    and LM head differ although the base uses a single tensor as embedding and LM head. Raises BadInput if the same
    token row is set twice. Raises TensorMismatch if the length of a row differs from the hidden size of the base.
    """
    edits: dict[str, dict[int, Array]] = {}
    sources: dict[str, TokenRows] = {}
    untrained: set[int] = set()
    for adapter in adapters:
        by_use = _by_use(base, adapter)
        if base.head is None:
            if len(by_use) == 2:
                _require_same(base, by_use)
            by_use = {_EMBEDDING: by_use.get(_EMBEDDING) or by_use[_HEAD]}
        elif _HEAD not in by_use and base.repeats():
            by_use = {**by_use, _HEAD: by_use[_EMBEDDING]}
        for use, token_rows in by_use.items():
            name = base.embedding if use == _EMBEDDING else str(base.head)
            _require_width(base, name, token_rows)
            _add(edits.setdefault(name, {}), token_rows)
            sources.setdefault(name, token_rows)
            untrained |= token_rows.untrained
    return RowEdits(edits, sources, frozenset(untrained))


def _by_use(base: VocabTensors, adapter: Adapter) -> dict[str, TokenRows]:
    """Return the adapter's token rows as a dict with the key "embedding", the key "head", or both keys."""
    uses: dict[str, TokenRows] = {}
    for edit in adapter.edits:
        if not isinstance(edit, TokenRows):
            _refuse(base, edit)
        module = edit.module.rpartition(".")[2]
        use = _EMBEDDING if module in EMBEDDINGS else _HEAD if module in HEADS else None
        if use is None:
            raise TensorMismatch(edit.path, edit.key, expected="the embedding or the LM head", found=edit.module)
        first = uses.setdefault(use, edit)
        if first is not edit and not _same(first, edit):
            raise NotExpressible(
                f"{edit.path}: {edit.key}",
                f"expected the rows of {first.key}, because both tensors set the {use}, found different rows",
            )
    return uses


def _refuse(base: VocabTensors, edit: Edit) -> NoReturn:
    """Raise NotExpressible, because ``edit`` is a change by the adapter that does not replace token rows.

    If a base checkpoint is given, ``as_rows`` has already reduced each resized embedding in an adapter to the added
    rows.
    """
    vocabulary = edit.module.rpartition(".")[2] in (*EMBEDDINGS, *HEADS)
    if isinstance(edit, FullModule) and edit.in_place and vocabulary:
        raise NotExpressible(
            f"{edit.path}: {edit.key}",
            "this tensor is a whole embedding or LM head, in which patch can find the trained rows only with the base",
            instead="use --base CHECKPOINT in place of --trust-base, or save the adapter with PEFT's "
            "save_pretrained(…, save_embedding_layers=False)",
        )
    raise NotExpressible(
        f"{edit.path}: {edit.key}",
        "patch can replace only token rows, but this adapter tensor does not contain token rows",
        instead=f"use ttexport merge --to {base.format}, which supports every kind of adapter",
    )


def _same(left: TokenRows, right: TokenRows) -> bool:
    return left.token_ids == right.token_ids and np.array_equal(left.rows, right.rows)


def _require_same(base: VocabTensors, by_use: Mapping[str, TokenRows]) -> None:
    if not _same(by_use[_EMBEDDING], by_use[_HEAD]):
        raise NotExpressible(
            f"{base.path}: {base.embedding}",
            f"the embedding is also the LM head, but {by_use[_HEAD].path} "
            "sets different rows for embedding and LM head",
            instead=f"use ttexport merge --untie --to {base.format} to write a separate LM head",
        )


def _require_width(base: VocabTensors, name: str, token_rows: TokenRows) -> None:
    width = base.widths[name]
    if (actual := token_rows.rows.shape[1]) != width:
        hint = f"the adapter was trained on a base that differs from {base.path}"
        raise TensorMismatch(
            token_rows.path, token_rows.key, expected=f"rows of width {width}", found=actual, hint=hint
        )


def _add(rows: dict[int, Array], token_rows: TokenRows) -> None:
    for token_id, row in zip(token_rows.token_ids, token_rows.rows, strict=True):
        if token_id in rows:
            where = f"{token_rows.path}: {token_rows.key}"
            raise BadInput(f"{where}: expected each token row to be set once, found two rows for token {token_id}")
        rows[token_id] = row


def patched_vocab(
    edits: Sequence[RowEdits], n_rows: int, n_tokens: int, *, tokenizer: Path | None, rows_in: object
) -> int:
    """Return the number of vocabulary rows after patching: ``n_rows``, or more if the edits set additional rows.

    n_rows: number of vocabulary rows before patching. n_tokens: highest token id of ``tokenizer`` plus one. rows_in:
    the tensor or folder that contains the vocabulary rows, for error messages. Raises TensorMismatch if the base has no
    row, and the tokenizer no token, for the token id of a trained row. Raises BadInput if the tokenizer contains a
    token id without a vocabulary row.
    """
    highest = max(edits, key=lambda edit: edit.highest_trained)
    limit = max(n_rows, n_tokens)
    if highest.highest_trained >= limit:
        source = next(iter(highest.sources.values()))
        hint = "the folder of an adapter with new tokens must contain the tokenizer with the new tokens"
        expected = f"token ids below {limit} (vocabulary size of {rows_in})"
        raise TensorMismatch(source.path, source.key, expected=expected, found=highest.highest_trained, hint=hint)
    vocab = max(n_rows, *(edit.highest + 1 for edit in edits))
    if n_tokens > vocab:
        raise BadInput(
            f"{tokenizer}: expected token ids below {vocab} (vocabulary size of {rows_in}), found {n_tokens - 1}"
        )
    return vocab
