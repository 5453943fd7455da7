"""The whole embedding that PEFT saves beside trained rows once the vocabulary was resized, seen as the rows it adds.

With ``save_embedding_layers="auto"``, PEFT's default, the adapter then holds the resized matrix: the base's rows, and
behind them those that resizing made. Where its first rows prove to be the base's, only the ones behind them say
anything, and those that were trained are set anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from exporter.errors import BadInput, NotExpressible, TensorMismatch
from exporter.merge.changes import EMBEDDING, HEAD
from exporter.merge.names import use_of
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import Edit, FullModule, TokenRows, first_not_finite
from exporter.tensors import BLOCK_BYTES, FLOATS, Array, LazyTensor, same_values

_UNUSED: Final = "the base's own matrix, resized"


def first_difference(one: LazyTensor, other: LazyTensor, n_rows: int) -> int | None:
    """The first of ``n_rows`` rows in which two tensors of one width differ by a bit of a value, whatever their dtypes.

    Memory: a block of each.
    """
    step = max(1, BLOCK_BYTES // max(1, one.spec.row_nbytes, other.spec.row_nbytes))
    for start in range(0, n_rows, step):
        pair = [tensor.rows(start, min(start + step, n_rows)) for tensor in (one, other)]
        wide = np.promote_types(pair[0].dtype, pair[1].dtype)
        left, right = (np.ascontiguousarray(rows.astype(wide, copy=False)).view(np.uint8) for rows in pair)
        if not np.array_equal(left, right):
            return start + int(np.flatnonzero((left != right).reshape(len(left), -1).any(axis=1))[0])
    return None


def as_rows(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> list[Adapter]:
    """``adapters`` with rows in place of each whole matrix that resizing the base's vocabulary made.

    What comes of them is what a merge makes of the matrices. Other whole tensors stay. Raises NotExpressible for a
    matrix that holds other rows than the base, TensorMismatch for one of another width or of fewer rows, or with a
    row that is not finite, BadInput where two adapters bring different ones.
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
                if not same_values(seen.tensor, edit.tensor):
                    found = f"{seen.path} too" if seen.path != edit.path else f"others in {seen.key}"
                    raise BadInput(f"{edit.path}: {edit.key}: expected the {use} to be set once, found {found}")
                continue
            rows = _rows_behind(edit, _base(checkpoint, use), taken[use])
            if rows is not None:
                added[use] = rows
        unused = {edit.key: _UNUSED for edit in adapter.edits if id(edit) in whole}
        edits = _with(checkpoint, [edit for edit in adapter.edits if id(edit) not in whole], added)
        reduced.append(replace(adapter, edits=edits, unused={**adapter.unused, **unused}))
    return reduced


def _use(checkpoint: Checkpoint, module: str) -> str | None:
    """``EMBEDDING`` or ``HEAD``; where one tensor serves both, what happens to either is the embedding's."""
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
    """Tokens whose rows some adapter sets."""
    found = (edit for adapter in adapters for edit in adapter.rows if _use(checkpoint, edit.module) == use)
    return {token_id for edit in found for token_id in edit.token_ids}


def _rows_behind(edit: FullModule, base: FileTensor, trained: set[int]) -> TokenRows | None:
    """The rows behind the base's that nobody trained, as resizing made them; None if there are none."""
    spec, held = edit.tensor.spec, base.spec.n_rows
    if base.spec.dtype not in FLOATS or spec.shape[1:] != base.spec.shape[1:] or spec.n_rows < held:
        expected = f"at least the {held} rows of width {base.spec.shape[-1]} of {base.place.path}"
        raise TensorMismatch(edit.path, edit.key, expected=expected, found=f"shape {spec.shape}")
    if (row := first_difference(edit.tensor, base, held)) is not None:
        raise NotExpressible(
            f"{edit.path}: {edit.key}",
            f"patch replaces rows of the vocabulary, and this is a whole matrix whose row {row} is not that of "
            f"{base.place.path}: it was trained as a whole, or on another base",
            instead="ttexport merge merges every kind of adapter",
        )
    ids = tuple(token_id for token_id in range(held, spec.n_rows) if token_id not in trained)
    if not ids:
        return None
    rows = edit.tensor.rows(held, spec.n_rows)[[token_id - held for token_id in ids]]
    if (wrong := first_not_finite(rows)) is not None:
        found = f"NaN or Inf in row {ids[wrong]}"
        raise TensorMismatch(edit.path, edit.key, expected="finite values", found=found)
    return TokenRows(edit.path, edit.key, edit.module, ids, rows, untrained=frozenset(ids))


def _with(checkpoint: Checkpoint, edits: Sequence[Edit], added: Mapping[str, TokenRows]) -> list[Edit]:
    """``edits`` with the rows that were added: to the trained ones of their use, however often a file has them."""
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
    wide = np.promote_types(edit.rows.dtype, more.rows.dtype)
    ids = (*edit.token_ids, *more.token_ids)
    rows: Array = np.concatenate([one.rows.astype(wide, copy=False) for one in (edit, more)])
    order = np.argsort(ids, kind="stable")
    made = edit.untrained | more.untrained
    return replace(edit, token_ids=tuple(sorted(ids)), rows=np.ascontiguousarray(rows[order]), untrained=made)
