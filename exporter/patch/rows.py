"""From adapters to rows of a base's vocabulary matrices: which rows of which tensor, in which dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, TypeVar

import numpy as np

from exporter.errors import BadInput, NotExpressible, TensorMismatch, in_tensor
from exporter.sources.hf.checkpoint import EMBEDDINGS, HEADS
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import FullModule, LowRank, TokenRows
from exporter.tensors import Array, cast

_EMBEDDING: Final = "embedding"
_HEAD: Final = "head"

_Encoded = TypeVar("_Encoded")


@dataclass(frozen=True)
class VocabTensors:
    """Names of the tensors that hold a base artifact's vocabulary. head: None where the embedding serves as the head.

    widths: tensor → hidden size. repeats: returns whether a head of its own is a second copy of the embedding; it
    reads rows, so it is called only where the answer matters.
    """

    path: Path
    format: str
    embedding: str
    head: str | None
    widths: Mapping[str, int]
    repeats: Callable[[], bool]

    @property
    def names(self) -> list[str]:
        """Tensor names, the embedding first."""
        return [self.embedding, *([self.head] if self.head else [])]


@dataclass(frozen=True)
class RowEdits:
    """The rows that a patch sets, for each tensor of the base: token id → final row (hidden,), in the trained dtype.

    sources: tensor → an adapter tensor that sets rows of it, for messages. untrained: token ids of rows that resizing
    the embedding created and training left unchanged.
    """

    rows: Mapping[str, Mapping[int, Array]]
    sources: Mapping[str, TokenRows]
    untrained: frozenset[int] = frozenset()

    @property
    def highest(self) -> int:
        """The highest token id."""
        return max(self._token_ids)

    @property
    def highest_trained(self) -> int:
        """The highest token id of a trained row, which needs a token in the vocabulary; -1 if there is none."""
        return max(self._token_ids - self.untrained, default=-1)

    @property
    def _token_ids(self) -> set[int]:
        return {token_id for rows in self.rows.values() for token_id in rows}

    def require_covered(self, path: Path, name: str, n_rows: int, vocab: int) -> None:
        """Raise BadInput if tensor ``name`` grows from ``n_rows`` to ``vocab`` rows and a new row is not set."""
        covered = self.rows.get(name, {}).keys()
        missing = next((token_id for token_id in range(n_rows, vocab) if token_id not in covered), None)
        if missing is not None:
            raise BadInput(
                f"{path}: {name}: expected the adapters to set every new row from {n_rows} to {vocab - 1}, "
                f"found none for token {missing}"
            )

    def encode(self, name: str, dtype: str, encoder: Callable[[Array], _Encoded]) -> tuple[tuple[int, ...], _Encoded]:
        """(token ids ascending, encoded rows) of tensor ``name``. encoder: gets the rows (k, hidden) in ``dtype``.

        Raises TensorMismatch for a value beyond the range of ``dtype``; BadInput, naming the adapter tensor, for what
        ``encoder`` raises as BadInput.
        """
        rows, source = self.rows[name], self.sources[name]
        token_ids = tuple(sorted(rows))
        values = np.stack([cast(rows[token_id], dtype) for token_id in token_ids])
        finite = np.isfinite(values.astype(np.float32)).all(axis=1)
        if not finite.all():
            actual = f"a larger one in the row of token {token_ids[int(np.flatnonzero(~finite)[0])]}"
            raise TensorMismatch(source.path, source.key, expected=f"values that {dtype} can hold", found=actual)
        with in_tensor(source.path, source.key):
            return token_ids, encoder(values)


def collect_rows(base: VocabTensors, adapters: Sequence[Adapter]) -> RowEdits:
    """Assign the adapters' rows to the base's tensors.

    Raises NotExpressible for adapters that hold more than rows, and for rows of head and embedding that differ where
    the base has one tensor for both; BadInput for a row that is set twice; TensorMismatch for rows of another width.
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
    """Use ("embedding", "head") → the adapter's rows for it."""
    uses: dict[str, TokenRows] = {}
    for edit in adapter.edits:
        if not isinstance(edit, TokenRows):
            _refuse(base, edit)
        module = edit.module.rpartition(".")[2]
        use = _EMBEDDING if module in EMBEDDINGS else _HEAD if module in HEADS else None
        if use is None:
            raise TensorMismatch(edit.path, edit.key, expected="a module that is embedding or head", found=edit.module)
        first = uses.setdefault(use, edit)
        if first is not edit and not _same(first, edit):
            raise NotExpressible(f"{edit.path}: {edit.key}", f"it differs from {first.key}, and both are the {use}")
    return uses


def _refuse(base: VocabTensors, edit: LowRank | FullModule) -> NoReturn:
    """Raise NotExpressible. With a base checkpoint, a whole vocabulary matrix was replaced by rows before."""
    vocabulary = edit.module.rpartition(".")[2] in (*EMBEDDINGS, *HEADS)
    if isinstance(edit, FullModule) and edit.in_place and vocabulary:
        raise NotExpressible(
            f"{edit.path}: {edit.key}",
            "patch replaces rows of the vocabulary, and only the base checkpoint shows which rows of this whole matrix "
            "were trained",
            instead="give --base CHECKPOINT in place of --trust-base, or save the adapter with PEFT's "
            "save_pretrained(…, save_embedding_layers=False)",
        )
    raise NotExpressible(
        f"{edit.path}: {edit.key}",
        "patch replaces rows of the vocabulary, and this is no row",
        instead=f"ttexport merge --to {base.format} merges every kind of adapter",
    )


def _same(left: TokenRows, right: TokenRows) -> bool:
    return left.token_ids == right.token_ids and np.array_equal(left.rows, right.rows)


def _require_same(base: VocabTensors, by_use: Mapping[str, TokenRows]) -> None:
    if not _same(by_use[_EMBEDDING], by_use[_HEAD]):
        raise NotExpressible(
            f"{base.path}: {base.embedding}",
            f"it serves as the head too, and {by_use[_HEAD].path} changes the two in different ways",
            instead=f"ttexport merge --untie --to {base.format} writes a head of its own",
        )


def _require_width(base: VocabTensors, name: str, token_rows: TokenRows) -> None:
    width = base.widths[name]
    if (actual := token_rows.rows.shape[1]) != width:
        hint = f"the adapter was trained on another base than {base.path}"
        raise TensorMismatch(
            token_rows.path, token_rows.key, expected=f"rows of width {width}", found=actual, hint=hint
        )


def _add(rows: dict[int, Array], token_rows: TokenRows) -> None:
    for token_id, row in zip(token_rows.token_ids, token_rows.rows, strict=True):
        if token_id in rows:
            where = f"{token_rows.path}: {token_rows.key}"
            raise BadInput(f"{where}: expected each row to be set once, found token {token_id} twice")
        rows[token_id] = row


def patched_vocab(
    edits: Sequence[RowEdits], n_rows: int, n_tokens: int, *, tokenizer: Path | None, rows_in: object
) -> int:
    """Rows of the vocabulary after patching: ``n_rows`` now, and more if the edits set rows beyond them.

    n_tokens: one more than the highest token id of ``tokenizer``. rows_in: what has the rows, for messages.
    Raises TensorMismatch for a trained row of a token that neither the base nor the tokenizer has; BadInput for a
    tokenizer that has more tokens than there are rows.
    """
    highest = max(edits, key=lambda edit: edit.highest_trained)
    limit = max(n_rows, n_tokens)
    if highest.highest_trained >= limit:
        source = next(iter(highest.sources.values()))
        hint = "new tokens need the tokenizer that names them beside the adapter"
        expected = f"token ids below {limit} (rows in {rows_in})"
        raise TensorMismatch(source.path, source.key, expected=expected, found=highest.highest_trained, hint=hint)
    vocab = max(n_rows, *(edit.highest + 1 for edit in edits))
    if n_tokens > vocab:
        raise BadInput(f"{tokenizer}: expected token ids below {vocab} (rows in {rows_in}), found {n_tokens - 1}")
    return vocab
