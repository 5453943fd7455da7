"""From adapters to rows of a base's vocabulary matrices: which rows, of which tensor, rounded how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import numpy as np

from exporter.errors import BadInput, NotExpressible, TensorMismatch
from exporter.sources.hf.checkpoint import EMBEDDINGS, HEADS
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import FullModule, LowRank, TokenRows
from exporter.tensors import Array, cast

_EMBEDDING: Final = "embedding"
_HEAD: Final = "head"

#: Rows that are compared where all would take too long.
_SAMPLED: Final = 32

Rows = Mapping[int, Array]


@dataclass(frozen=True)
class Matrices:
    """The vocabulary of a base file. head: None where the embedding serves as the head too.

    widths: tensor → hidden size. repeats: asks whether a head of its own holds the embedding once more.
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
class Wanted:
    """Token id → final row (hidden,), dtype as trained, for each tensor of the file that changes.

    where: the adapter file of each tensor's rows, for messages. untrained: tokens whose rows resizing made.
    """

    rows: Mapping[str, Rows]
    where: Mapping[str, TokenRows]
    untrained: frozenset[int] = frozenset()

    @property
    def highest(self) -> int:
        """The highest token id of all."""
        return max(self._token_ids)

    @property
    def highest_trained(self) -> int:
        """The highest token id whose row was trained, which needs a token; -1 if there is none."""
        return max(self._token_ids - self.untrained, default=-1)

    @property
    def _token_ids(self) -> set[int]:
        return {token_id for rows in self.rows.values() for token_id in rows}

    def require_covered(self, path: Path, name: str, held: int, size: int) -> None:
        """Raises BadInput if the tensor ``name`` of ``held`` rows grows to ``size``, and a new row is set by nobody."""
        covered = self.rows.get(name, {}).keys()
        missing = next((token_id for token_id in range(held, size) if token_id not in covered), None)
        if missing is not None:
            raise BadInput(
                f"{path}: {name}: expected the adapters to set every new row from {held} to {size - 1}, "
                f"found none for token {missing}"
            )


def gather(base: Matrices, adapters: Sequence[Adapter]) -> Wanted:
    """Sort the adapters' rows into the base's tensors.

    Raises NotExpressible for adapters that hold more than rows, and for rows of head and embedding that differ where
    the base has one tensor for both; BadInput for a row that is set twice; TensorMismatch for rows of another width.
    """
    found: dict[str, dict[int, Array]] = {}
    where: dict[str, TokenRows] = {}
    untrained: set[int] = set()
    for adapter in adapters:
        own = _uses(base, adapter)
        if base.head is None:
            if len(own) == 2:
                _require_same(base, own)
            own = {_EMBEDDING: own.get(_EMBEDDING) or own[_HEAD]}
        elif _HEAD not in own and base.repeats():
            own = {**own, _HEAD: own[_EMBEDDING]}
        for use, part in own.items():
            name = base.embedding if use == _EMBEDDING else str(base.head)
            _check(base, name, part)
            _add(found.setdefault(name, {}), part)
            where.setdefault(name, part)
            untrained |= part.untrained
    return Wanted(found, where, frozenset(untrained))


def _uses(base: Matrices, adapter: Adapter) -> dict[str, TokenRows]:
    """Use of the vocabulary → the adapter's rows for it."""
    uses: dict[str, TokenRows] = {}
    for part in adapter.edits:
        if not isinstance(part, TokenRows):
            _refuse(base, part)
        last = part.module.rpartition(".")[2]
        use = _EMBEDDING if last in EMBEDDINGS else _HEAD if last in HEADS else None
        if use is None:
            raise TensorMismatch(part.path, part.key, expected="a module that is embedding or head", found=part.module)
        first = uses.setdefault(use, part)
        if first is not part and not _same(first, part):
            raise NotExpressible(f"{part.path}: {part.key}", f"it differs from {first.key}, and both are the {use}")
    return uses


def _refuse(base: Matrices, part: LowRank | FullModule) -> NoReturn:
    """What was left of a resized matrix has had no base to be compared with: a patch with one took it for rows."""
    vocabulary = part.module.rpartition(".")[2] in (*EMBEDDINGS, *HEADS)
    if isinstance(part, FullModule) and part.in_place and vocabulary:
        raise NotExpressible(
            f"{part.path}: {part.key}",
            "patch replaces rows of the vocabulary, and which rows of this whole matrix are the base's, the base tells",
            instead="give --base CHECKPOINT in place of --trust-base, or save the adapter with PEFT's "
            "save_pretrained(…, save_embedding_layers=False)",
        )
    raise NotExpressible(
        f"{part.path}: {part.key}",
        "patch replaces rows of the vocabulary, and this is no row",
        instead=f"ttexport merge --to {base.format} merges every kind of adapter",
    )


def _same(one: TokenRows, other: TokenRows) -> bool:
    return one.token_ids == other.token_ids and np.array_equal(one.rows, other.rows)


def _require_same(base: Matrices, own: Mapping[str, TokenRows]) -> None:
    if not _same(own[_EMBEDDING], own[_HEAD]):
        raise NotExpressible(
            f"{base.path}: {base.embedding}",
            f"it serves as the head too, and {own[_HEAD].path} changes the two in different ways",
            instead=f"ttexport merge --untie --to {base.format} writes a head of its own",
        )


def sample(n_rows: int, count: int = _SAMPLED) -> list[int]:
    """At most ``count`` of ``range(n_rows)``, evenly spread, ascending."""
    return sorted({round(step * (n_rows - 1) / max(1, count - 1)) for step in range(count)})


def _check(base: Matrices, name: str, part: TokenRows) -> None:
    width = base.widths[name]
    if part.rows.shape[1] != width:
        hint = f"the adapter was trained on another base than {base.path}"
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
