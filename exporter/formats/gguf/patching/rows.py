"""From adapters to rows of a GGUF's vocabulary matrices: which rows, of which tensor, rounded how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from exporter.errors import BadInput, NotExpressible, TensorMismatch, UnreadableFile
from exporter.sources.adapter import Adapter
from exporter.sources.adapter_parts import TokenRows
from exporter.sources.checkpoint import EMBEDDINGS, HEADS
from exporter.sources.gguf_header import GgufTensor
from exporter.sources.gguf_parts import GgufParts
from exporter.tensors import Array, cast

EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"

#: Rows of both matrices that are compared to tell a head that merely repeats the embedding.
_SAMPLED: Final = 32

Rows = Mapping[int, Array]


@dataclass(frozen=True)
class Wanted:
    """Token id → final row (hidden,), dtype as trained, for each tensor of the file that changes.

    where: the adapter file of each tensor's rows, for messages.
    """

    rows: Mapping[str, Rows]
    where: Mapping[str, TokenRows]

    @property
    def highest(self) -> int:
        """The highest token id of all."""
        return max(token_id for rows in self.rows.values() for token_id in rows)


def gather(parts: GgufParts, adapters: Sequence[Adapter]) -> Wanted:
    """Sort the adapters' rows into the file's tensors.

    Raises NotExpressible for adapters that hold more than rows, and for rows of head and embedding that differ where
    the file has one tensor for both; BadInput for a row that is set twice; TensorMismatch for rows of another width.
    """
    if EMBEDDING not in parts.tensors:
        raise UnreadableFile(parts.path, f"{EMBEDDING}: expected an input embedding, found none")
    tied = HEAD not in parts.tensors
    found: dict[str, dict[int, Array]] = {}
    where: dict[str, TokenRows] = {}
    for adapter in adapters:
        own = _uses(adapter)
        if tied and len(own) == 2:
            _require_same(parts, own)
        if EMBEDDING not in own and tied:
            own = {EMBEDDING: own[HEAD]}
        elif HEAD not in own and not tied and _repeats(parts):
            own = {**own, HEAD: own[EMBEDDING]}
        for name, part in own.items():
            if tied and name == HEAD:
                continue
            _check(parts, parts.tensors[name], part)
            _add(found.setdefault(name, {}), part)
            where.setdefault(name, part)
    return Wanted(found, where)


def _uses(adapter: Adapter) -> dict[str, TokenRows]:
    """Tensor of the file → the adapter's rows of it."""
    uses: dict[str, TokenRows] = {}
    for part in adapter.parts:
        if not isinstance(part, TokenRows):
            raise NotExpressible(
                f"{part.path}: {part.key}",
                "patch replaces rows of the vocabulary, and this is no row",
                instead="ttexport merge --to gguf merges every kind of adapter",
            )
        last = part.module.rpartition(".")[2]
        name = EMBEDDING if last in EMBEDDINGS else HEAD if last in HEADS else None
        if name is None:
            raise TensorMismatch(part.path, part.key, expected="a module that is embedding or head", found=part.module)
        first = uses.setdefault(name, part)
        if first is not part and not _same(first, part):
            raise NotExpressible(f"{part.path}: {part.key}", f"it differs from {first.key}, and both are {name}")
    return uses


def _same(one: TokenRows, other: TokenRows) -> bool:
    return one.token_ids == other.token_ids and np.array_equal(one.rows, other.rows)


def _require_same(parts: GgufParts, own: Mapping[str, TokenRows]) -> None:
    if not _same(own[EMBEDDING], own[HEAD]):
        raise NotExpressible(
            f"{parts.path}: {EMBEDDING}",
            f"it serves as the head too, and {own[HEAD].path} changes the two in different ways",
            instead="ttexport merge --untie --to gguf writes a head of its own",
        )


def _repeats(parts: GgufParts) -> bool:
    """Whether the head is a stored copy of the embedding, as some converters write it for tied models."""
    one, other = parts.tensors[EMBEDDING], parts.tensors[HEAD]
    if (one.type, one.shape) != (other.type, other.shape):
        return False
    files = parts.holder(EMBEDDING), parts.holder(HEAD)
    return all(
        np.array_equal(files[0].rows(EMBEDDING, row, row + 1), files[1].rows(HEAD, row, row + 1))
        for row in sample(one.n_rows)
    )


def sample(n_rows: int, count: int = _SAMPLED) -> list[int]:
    """At most ``count`` of ``range(n_rows)``, evenly spread, ascending."""
    return sorted({round(step * (n_rows - 1) / max(1, count - 1)) for step in range(count)})


def _check(parts: GgufParts, tensor: GgufTensor, part: TokenRows) -> None:
    width = tensor.shape[-1]
    if len(tensor.shape) != 2 or part.rows.shape[1] != width:
        hint = f"the adapter was trained on another base than {parts.path}"
        raise TensorMismatch(
            part.path, part.key, expected=f"rows of width {width}", found=part.rows.shape[1], hint=hint
        )


def _add(rows: dict[int, Array], part: TokenRows) -> None:
    for token_id, row in zip(part.token_ids, part.rows, strict=True):
        if token_id in rows:
            raise BadInput(f"{part.path}: {part.key}: expected each row to be set once, found token {token_id} twice")
        rows[token_id] = row


def rounded(wanted: Wanted, name: str, dtype: str) -> tuple[tuple[int, ...], Array]:
    """(token ids ascending, rows (k, hidden) in ``dtype``) of one tensor. Raises TensorMismatch for an overflow."""
    rows, part = wanted.rows[name], wanted.where[name]
    ids = tuple(sorted(rows))
    out = np.stack([cast(rows[token_id], dtype) for token_id in ids])
    finite = np.isfinite(out.astype(np.float32)).all(axis=1)
    if not finite.all():
        found = f"a larger one in the row of token {ids[int(np.flatnonzero(~finite)[0])]}"
        raise TensorMismatch(part.path, part.key, expected=f"values that {dtype} can hold", found=found)
    return ids, out
