"""Reduces a whole resized embedding in an adapter file to the rows that resizing the vocabulary added.

With ``save_embedding_layers="auto"``, PEFT's default, an adapter trained with a resized vocabulary stores the whole
resized embedding in addition to the trained rows. The resized embedding contains the rows of the base model, followed
by the rows that resizing added. If the first rows of the resized embedding equal the rows of the base model, only the
added rows are needed. The adapter file also contains, in a separate tensor, those added rows that were trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from exporter.errors import BadInput, NotExpressible, TensorMismatch
from exporter.merge.vocabulary.files import merge_auxiliary_files
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.hf.tokenizer import Tokenizer
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import Edit, FullModule, TokenRows, first_not_finite
from exporter.sources.places import EMBEDDING, HEAD, use_of
from exporter.tensors import FLOATS, Array, first_difference

_UNUSED: Final = "resized matrix of the base"


def as_rows(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return copies of ``adapters`` in which only the added rows remain of each whole resized embedding or head.

    Merging the returned adapters and merging the given adapters gives the same result. All other whole tensors in the
    adapters are kept. Raises NotExpressible if the first rows of a resized matrix differ from the rows of the base
    model. Raises TensorMismatch if a resized matrix differs from the base matrix in width, lacks a trained row, or
    contains NaN or Inf. Raises BadInput if two adapters contain different resized matrices, or if a token of the
    tokenizer has no row in a resized matrix.
    """
    taken = {use: _trained(checkpoint, adapters, use) for use in (EMBEDDING, HEAD)}
    first: dict[str, FullModule] = {}
    reduced = []
    for adapter in adapters:
        whole = {id(edit): use for edit in adapter.edits if (use := _resized_use(checkpoint, edit)) is not None}
        added: dict[str, TokenRows] = {}
        for edit in adapter.edits:
            if (use := whole.get(id(edit))) is None:
                continue
            assert isinstance(edit, FullModule)
            seen = first.setdefault(use, edit)
            if seen is not edit:
                if not seen.equals(edit):
                    actual = f"different values in {seen.path if seen.path != edit.path else seen.key}"
                    raise BadInput(f"{edit.path}: {edit.key}: expected a single resized {use}, found {actual}")
                continue
            rows = _untrained_rows(edit, _base(checkpoint, use), taken[use])
            if rows is not None:
                added[use] = rows
        unused = {edit.key: _UNUSED for edit in adapter.edits if id(edit) in whole}
        edits = _with_rows(checkpoint, [edit for edit in adapter.edits if id(edit) not in whole], added)
        reduced.append(replace(adapter, edits=edits, unused={**adapter.unused, **unused}))
    for edit in first.values():
        _require_rows_of_tokens(checkpoint, adapters, edit)
    return reduced


def _require_rows_of_tokens(checkpoint: Checkpoint, adapters: Sequence[Adapter], edit: FullModule) -> None:
    """Raise BadInput if a token of the merged tokenizer has no row in the resized matrix, as a merge does.

    Only a matrix with fewer rows than the base is checked; missing rows of new tokens are reported for the artifact.
    """
    n_rows = edit.tensor.spec.n_rows
    if n_rows >= checkpoint.tensors[checkpoint.tie.embedding].spec.n_rows:
        return
    path = merge_auxiliary_files(checkpoint.auxiliary_files, adapters).get("tokenizer.json")
    lost = Tokenizer.open(path).texts_from(n_rows) if path else {}
    new = {token_id for adapter in adapters for rows in adapter.rows for token_id in rows.token_ids}
    for token_id, text in lost.items():
        if token_id not in new:
            raise BadInput(
                f"{path}: expected token ids below {n_rows}, the number of rows of {edit.key} in {edit.path}, found "
                f"{token_id} for the token {text!r}; resize the model to the number of tokens before training"
            )


def _use(checkpoint: Checkpoint, module: str) -> str | None:
    """Return ``EMBEDDING`` or ``HEAD`` if ``module`` is the embedding or the head, else None.

    If embedding and head are tied, returns ``EMBEDDING`` for the head, too.
    """
    use = use_of(checkpoint, module)
    return EMBEDDING if use is not None and checkpoint.tie.tied else use


def _resized_use(checkpoint: Checkpoint, edit: Edit) -> str | None:
    if isinstance(edit, FullModule) and edit.in_place and edit.parameter == "weight":
        return _use(checkpoint, edit.module)
    return None


def _base(checkpoint: Checkpoint, use: str) -> FileTensor:
    tie = checkpoint.tie
    return checkpoint.tensors[tie.embedding if use == EMBEDDING or tie.head is None else tie.head]


def _trained(checkpoint: Checkpoint, adapters: Sequence[Adapter], use: str) -> set[int]:
    """Return the ids of all tokens for which one of the adapters contains a trained row of the embedding or head."""
    edits = (edit for adapter in adapters for edit in adapter.rows if _use(checkpoint, edit.module) == use)
    return {token_id for edit in edits for token_id in edit.token_ids}


def _untrained_rows(edit: FullModule, base: FileTensor, trained: set[int]) -> TokenRows | None:
    """Return the untrained rows that resizing added after the base's rows, or None if all added rows were trained."""
    spec, n_base = edit.tensor.spec, base.spec.n_rows
    shared = min(spec.n_rows, n_base)
    needed = min(max(trained, default=-1) + 1, n_base)
    if base.spec.dtype not in FLOATS or spec.shape[1:] != base.spec.shape[1:] or spec.n_rows < needed:
        expected = f"at least {needed} rows of width {base.spec.shape[-1]}, as in {base.place.path}"
        raise TensorMismatch(edit.path, edit.key, expected=expected, found=f"shape {spec.shape}")
    if (row := first_difference(edit.tensor, base, shared)) is not None:
        raise NotExpressible(
            f"{edit.path}: {edit.key}",
            f"patch can replace only token rows, but row {row} of this whole matrix differs from "
            f"{base.place.path}; the whole matrix was trained, or the adapter was trained on a different base",
            instead="use ttexport merge, which merges every kind of adapter",
        )
    ids = tuple(token_id for token_id in range(n_base, spec.n_rows) if token_id not in trained)
    if not ids:
        return None
    rows = edit.tensor.rows(n_base, spec.n_rows)[[token_id - n_base for token_id in ids]]
    if (wrong := first_not_finite(rows)) is not None:
        actual = f"NaN or Inf in row {ids[wrong]}"
        raise TensorMismatch(edit.path, edit.key, expected="finite values", found=actual)
    return TokenRows(edit.path, edit.key, edit.module, ids, rows, untrained=frozenset(ids))


def _with_rows(checkpoint: Checkpoint, edits: Sequence[Edit], added: Mapping[str, TokenRows]) -> list[Edit]:
    """Return a copy of ``edits`` that also sets the rows that resizing the vocabulary added.

    The added rows are joined to each existing edit that sets rows of the same matrix. If no edit sets rows of the
    matrix, the added rows form a new edit.
    """
    joined: list[Edit] = []
    missing = dict(added)
    for edit in edits:
        use = _use(checkpoint, edit.module) if isinstance(edit, TokenRows) else None
        more = added.get(use) if use is not None else None
        if isinstance(edit, TokenRows) and use is not None and more is not None:
            missing.pop(use, None)
            edit = _joined(edit, more)
        joined.append(edit)
    return [*joined, *missing.values()]


def _joined(edit: TokenRows, more: TokenRows) -> TokenRows:
    dtype = np.promote_types(edit.rows.dtype, more.rows.dtype)
    ids = (*edit.token_ids, *more.token_ids)
    rows: Array = np.concatenate([block.astype(dtype, copy=False) for block in (edit.rows, more.rows)])
    order = np.argsort(ids, kind="stable")
    untrained = edit.untrained | more.untrained
    return replace(edit, token_ids=tuple(sorted(ids)), rows=np.ascontiguousarray(rows[order]), untrained=untrained)
