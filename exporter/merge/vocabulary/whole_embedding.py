"""Reduces a whole embedding that PEFT saved after resizing the vocabulary to the rows that resizing added.

With ``save_embedding_layers="auto"``, PEFT's default, an adapter with a resized vocabulary stores the resized matrix
beside the trained rows. The resized matrix contains the base's rows, followed by the rows that resizing created. If the
first rows equal the base's rows, only the added rows carry information. Added rows that were trained are also stored as
token rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from exporter.errors import BadInput, NotExpressible, TensorMismatch
from exporter.merge.names import EMBEDDING, HEAD, use_of
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import Edit, FullModule, TokenRows, first_not_finite
from exporter.tensors import FLOATS, Array, first_difference

_UNUSED: Final = "the base's own matrix, resized"


def as_rows(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> list[Adapter]:
    """``adapters`` with token rows in place of whole matrices that resizing the base's vocabulary created.

    A merge of the result equals a merge of the whole matrices. All other whole tensors stay. Raises NotExpressible if
    the first rows of a matrix differ from the base. Raises TensorMismatch if a matrix differs from the base in width,
    has fewer rows than the base, or contains NaN or Inf. Raises BadInput if two adapters store different matrices.
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
                    actual = f"other values in {seen.path if seen.path != edit.path else seen.key}"
                    raise BadInput(f"{edit.path}: {edit.key}: expected one value for the {use}, found {actual}")
                continue
            rows = _untrained_rows(edit, _base(checkpoint, use), taken[use])
            if rows is not None:
                added[use] = rows
        unused = {edit.key: _UNUSED for edit in adapter.edits if id(edit) in whole}
        edits = _with_rows(checkpoint, [edit for edit in adapter.edits if id(edit) not in whole], added)
        reduced.append(replace(adapter, edits=edits, unused={**adapter.unused, **unused}))
    return reduced


def _use(checkpoint: Checkpoint, module: str) -> str | None:
    """``EMBEDDING`` or ``HEAD``. Always ``EMBEDDING`` if one tensor serves as embedding and head."""
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
    """Ids of the tokens for which an adapter contains rows."""
    edits = (edit for adapter in adapters for edit in adapter.rows if _use(checkpoint, edit.module) == use)
    return {token_id for edit in edits for token_id in edit.token_ids}


def _untrained_rows(edit: FullModule, base: FileTensor, trained: set[int]) -> TokenRows | None:
    """The untrained rows that resizing added after the base's rows, or None if resizing added no untrained row."""
    spec, n_base = edit.tensor.spec, base.spec.n_rows
    if base.spec.dtype not in FLOATS or spec.shape[1:] != base.spec.shape[1:] or spec.n_rows < n_base:
        expected = f"at least the {n_base} rows of width {base.spec.shape[-1]} of {base.place.path}"
        raise TensorMismatch(edit.path, edit.key, expected=expected, found=f"shape {spec.shape}")
    if (row := first_difference(edit.tensor, base, n_base)) is not None:
        raise NotExpressible(
            f"{edit.path}: {edit.key}",
            f"patch replaces only rows of the vocabulary, and this tensor is a whole matrix; row {row} of the matrix "
            f"differs from {base.place.path}: the matrix was trained as a whole, or on a different base",
            instead="ttexport merge merges every kind of adapter",
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
    """``edits`` with the added rows. Added rows are joined to every trained edit of the same use, or form new edits."""
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
