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
from exporter.sources.peft.parts import FullModule, Part, TokenRows, first_not_finite
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
        whole = {id(part): use for part in adapter.parts if (use := _resized_use(checkpoint, part)) is not None}
        added: dict[str, TokenRows] = {}
        for part in adapter.parts:
            if (use := whole.get(id(part))) is None:
                continue
            assert isinstance(part, FullModule)
            seen = first.setdefault(use, part)
            if seen is not part:
                if not same_values(seen.tensor, part.tensor):
                    found = f"{seen.path} too" if seen.path != part.path else f"others in {seen.key}"
                    raise BadInput(f"{part.path}: {part.key}: expected the {use} to be set once, found {found}")
                continue
            rows = _rows_behind(part, _base(checkpoint, use), taken[use])
            if rows is not None:
                added[use] = rows
        unused = {part.key: _UNUSED for part in adapter.parts if id(part) in whole}
        parts = _with(checkpoint, [part for part in adapter.parts if id(part) not in whole], added)
        reduced.append(replace(adapter, parts=parts, unused={**adapter.unused, **unused}))
    return reduced


def _use(checkpoint: Checkpoint, module: str) -> str | None:
    """``EMBEDDING`` or ``HEAD``; where one tensor serves both, what happens to either is the embedding's."""
    use = use_of(checkpoint, module)
    return EMBEDDING if use is not None and checkpoint.tie.tied else use


def _resized_use(checkpoint: Checkpoint, part: Part) -> str | None:
    if isinstance(part, FullModule) and part.in_place and part.parameter == "weight":
        return _use(checkpoint, part.module)
    return None


def _base(checkpoint: Checkpoint, use: str) -> FileTensor:
    tie = checkpoint.tie
    return checkpoint.tensors[tie.embedding if use == EMBEDDING or tie.head is None else tie.head]


def _trained(checkpoint: Checkpoint, adapters: Sequence[Adapter], use: str) -> set[int]:
    """Tokens whose rows some adapter sets."""
    found = (part for adapter in adapters for part in adapter.rows if _use(checkpoint, part.module) == use)
    return {token_id for part in found for token_id in part.token_ids}


def _rows_behind(part: FullModule, base: FileTensor, trained: set[int]) -> TokenRows | None:
    """The rows behind the base's that nobody trained, as resizing made them; None if there are none."""
    spec, held = part.tensor.spec, base.spec.n_rows
    if base.spec.dtype not in FLOATS or spec.shape[1:] != base.spec.shape[1:] or spec.n_rows < held:
        expected = f"at least the {held} rows of width {base.spec.shape[-1]} of {base.place.path}"
        raise TensorMismatch(part.path, part.key, expected=expected, found=f"shape {spec.shape}")
    if (row := first_difference(part.tensor, base, held)) is not None:
        raise NotExpressible(
            f"{part.path}: {part.key}",
            f"patch replaces rows of the vocabulary, and this is a whole matrix whose row {row} is not that of "
            f"{base.place.path}: it was trained as a whole, or on another base",
            instead="ttexport merge merges every kind of adapter",
        )
    ids = tuple(token_id for token_id in range(held, spec.n_rows) if token_id not in trained)
    if not ids:
        return None
    rows = part.tensor.rows(held, spec.n_rows)[[token_id - held for token_id in ids]]
    if (wrong := first_not_finite(rows)) is not None:
        found = f"NaN or Inf in row {ids[wrong]}"
        raise TensorMismatch(part.path, part.key, expected="finite values", found=found)
    return TokenRows(part.path, part.key, part.module, ids, rows, untrained=frozenset(ids))


def _with(checkpoint: Checkpoint, parts: Sequence[Part], added: Mapping[str, TokenRows]) -> list[Part]:
    """``parts`` with the rows that were added: to the trained ones of their use, however often a file has them."""
    joined: list[Part] = []
    missing = dict(added)
    for part in parts:
        use = _use(checkpoint, part.module) if isinstance(part, TokenRows) else None
        more = added.get(use) if use is not None else None
        if isinstance(part, TokenRows) and use is not None and more is not None:
            missing.pop(use, None)
            part = _joined(part, more)
        joined.append(part)
    return [*joined, *missing.values()]


def _joined(part: TokenRows, more: TokenRows) -> TokenRows:
    wide = np.promote_types(part.rows.dtype, more.rows.dtype)
    ids = (*part.token_ids, *more.token_ids)
    rows: Array = np.concatenate([one.rows.astype(wide, copy=False) for one in (part, more)])
    order = np.argsort(ids, kind="stable")
    made = part.untrained | more.untrained
    return replace(part, token_ids=tuple(sorted(ids)), rows=np.ascontiguousarray(rows[order]), untrained=made)
