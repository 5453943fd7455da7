"""Compute the expected values of the tuned model's tensors from the base checkpoint and the adapters.

The computation does not use the exporter's merge code. Module names of adapters are matched with tensor names of the
base after removing prefixes such as ``model`` and ``transformer``. Sums of base and updates are computed row by row in
float64. An artifact's value that was merged in float32 and rounded once must be within one unit in the last place of
the expected value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from exporter.errors import BadInput
from exporter.sources.hf.checkpoint import EMBEDDINGS, HEADS, Checkpoint
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import FullModule, LowRank, TokenRows
from exporter.tensors import Array, read
from exporter.verify.expect.experts import expert_pieces, index_experts, stacked_products, wide_factors

_PREFIXES: Final = frozenset({"model", "transformer", "gpt_neox", "language_model"})


@dataclass
class Expected:
    """The expected values of one tensor of the tuned model.

    base: the tensor in the base checkpoint.
    full: a whole tensor from an adapter that replaces ``base``, or None.
    rows: a dict that maps token ids to trained rows, as stored in the adapters.
    updates: low-rank updates that are added to the tensor.
    biases: low-rank updates with a bias that is added to the tensor.
    """

    base: FileTensor
    full: FullModule | None = None
    rows: dict[int, Array] = field(default_factory=dict)
    updates: list[LowRank] = field(default_factory=list)
    biases: list[LowRank] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        """Whether any adapter changes the tensor."""
        return bool(self.full or self.rows or self.updates or self.biases)

    @property
    def computed(self) -> bool:
        """Whether the expected values are sums of stored values and updates and not copies of stored values."""
        return bool(self.updates or self.biases)

    @property
    def source(self) -> FileTensor:
        """The base's tensor or an adapter's replacement, to which trained rows and updates are then applied."""
        return self.full.tensor if self.full else self.base

    @property
    def n_rows(self) -> int:
        """The number of rows of the tuned tensor."""
        return max([self.source.spec.n_rows, *(token_id + 1 for token_id in self.rows)])

    def values(self, ids: Sequence[int]) -> Array:
        """Return the expected values of the rows ``ids`` as a float64 array of shape (n, ...).

        A row that exists neither in the adapters nor in the base is returned as NaN.
        """
        shape = (len(ids), *self.source.spec.shape[1:])
        out = np.full(shape, np.nan)
        for place, row in enumerate(ids):
            if row in self.rows:
                out[place] = self.rows[row]
            elif row < self.source.spec.n_rows:
                out[place] = self.source.rows(row, row + 1)[0].astype(np.float64)
        for update in self.updates:
            out = self._updated(out, update, ids)
        for update in self.biases:
            assert update.bias is not None
            out += update.scaling * _wide(update.bias)[list(ids)]
        return out

    def _updated(self, value: Array, update: LowRank, ids: Sequence[int]) -> Array:
        if len(self.source.spec.shape) == 3:
            return value + update.scaling * stacked_products(update, self.source.spec.shape, ids)
        down, up = wide_factors(update)
        transposed = _stored_in_out(update, self.source.spec.shape)
        left, right = (down.T, up.T) if transposed else (up, down)
        value = value + update.scaling * (left[list(ids)] @ right)
        if update.magnitude is None:
            return value
        gain = _wide(update.magnitude).reshape(-1)
        if transposed:
            factors: Array = gain / self._column_norms(update.scaling * left, right)
        else:
            factors = (gain[list(ids)] / np.linalg.norm(value, axis=1))[:, None]
        scaled: Array = value * factors
        return scaled

    def _column_norms(self, left: Array, right: Array) -> Array:
        spec = self.source.spec
        total = np.zeros(right.shape[1])
        for start in range(0, spec.n_rows, 1024):
            block = self.source.rows(start, min(start + 1024, spec.n_rows)).astype(np.float64)
            total += np.square(block + left[start : start + len(block)] @ right).sum(axis=0)
        norms: Array = np.sqrt(total)
        return norms


def expected(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> dict[str, Expected]:
    """Map the name of each tensor in the base checkpoint to the tensor's expected values.

    If the base checkpoint has no separate tensor for the output head, the expected values of the head have the key
    ``lm_head``.
    """
    tie = checkpoint.tie
    wanted = {name: Expected(tensor) for name, tensor in checkpoint.tensors.items()}
    head = tie.head or "lm_head"
    if tie.head is None:
        wanted[head] = Expected(checkpoint.tensors[tie.embedding])
    by_path = {_path(name): name for name in checkpoint.tensors}
    for adapter in adapters:
        touched = set()
        for name, part in _named_parts(checkpoint, adapter, by_path, head):
            touched.add((name, type(part)))
            _apply(wanted[name], part)
        _follow_tie(checkpoint, adapter, wanted, head, touched)
    return wanted


def _named_parts(
    checkpoint: Checkpoint, adapter: Adapter, by_path: Mapping[tuple[str, ...], str], head: str
) -> Iterator[tuple[str, TokenRows | LowRank | FullModule]]:
    experts = index_experts(checkpoint.tensors)
    for part in adapter.edits:
        parameter = "weight" if isinstance(part, TokenRows) else part.parameter
        name = by_path.get(_path(f"{part.module}.{parameter}"))
        if name is None and isinstance(part, LowRank) and (pieces := list(expert_pieces(part, experts))):
            yield from pieces
            continue
        if name is None:
            leaf = part.module.rpartition(".")[2]
            name = checkpoint.tie.embedding if leaf in EMBEDDINGS else head if leaf in HEADS else None
        if name is None:
            raise BadInput(
                f"{part.path}: {part.key}: expected the name of a module in {checkpoint.path}, found {part.module}"
            )
        yield name, part
        if isinstance(part, LowRank) and part.bias is not None and (bias := by_path.get(_path(f"{part.module}.bias"))):
            yield bias, part


def _apply(want: Expected, part: TokenRows | LowRank | FullModule) -> None:
    if isinstance(part, TokenRows):
        for token_id, row in zip(part.token_ids, part.rows, strict=True):
            if token_id in want.rows and not np.array_equal(want.rows[token_id], row):
                raise BadInput(
                    f"{part.path}: {part.key}: expected one trained row for token {token_id}, found two different rows"
                )
            want.rows[token_id] = row
    elif isinstance(part, FullModule):
        want.full = part
    elif len(want.base.spec.shape) == 1:
        want.biases.append(part)
    elif part not in want.updates:
        want.updates.append(part)


def _follow_tie(
    checkpoint: Checkpoint, adapter: Adapter, wanted: dict[str, Expected], head: str, touched: set[tuple[str, type]]
) -> None:
    """Apply an adapter's changes of the embedding or the head to all tensors that share the tied matrix.

    A tied tensor that has its own trained rows in the adapter is left unchanged.
    """
    tie = checkpoint.tie
    names = (tie.embedding, *tie.copies, *((head,) if tie.tied or tie.tied_in_config else ()))
    copied = wanted[head].full
    own_head = copied is not None and not copied.in_place
    source = next((name for name in names if (name, TokenRows) in touched), None)
    only_head = source == head and (bool(adapter.config.get("trainable_token_indices")) or _names_head(adapter))
    if source is not None and not only_head:
        own = {token_id for part in adapter.rows for token_id in part.token_ids} & wanted[source].rows.keys()
        followed = {token_id: wanted[source].rows[token_id] for token_id in sorted(own)}
        for name in names:
            if (name, TokenRows) not in touched and not (name == head and own_head):
                wanted[name].rows |= followed
    grown = next((wanted[name].full for name in names if (full := wanted[name].full) and full.in_place), None)
    for name in (tie.embedding, *tie.copies, *((head,) if tie.tied else ())):
        if grown is not None and wanted[name].full is None:
            wanted[name].full = grown


def same_values(first: Expected, second: Expected) -> bool:
    """Whether two expected tensors that were one matrix in the base, such as embedding and head, have equal values."""
    left, right = first.source, second.source
    if left is not right and (left.spec.shape != right.spec.shape or not np.array_equal(read(left), read(right))):
        return False
    if first.rows.keys() != second.rows.keys():
        return False
    if not all(np.array_equal(row, second.rows[token_id]) for token_id, row in first.rows.items()):
        return False
    if any(update.magnitude for update in (*first.updates, *second.updates)):
        return not first.updates and not second.updates
    factors = [[_factors(update) for update in use.updates] for use in (first, second)]
    return len(factors[0]) == len(factors[1]) and all(
        left[0] == right[0] and np.array_equal(left[1], right[1]) and np.array_equal(left[2], right[2])
        for left, right in zip(*factors, strict=True)
    )


def _factors(update: LowRank) -> tuple[float, Array, Array]:
    """Return (scaling, left factor, right factor) of a low-rank update of the embedding or the head.

    The left factor has the shape (vocabulary, r), and the right factor has the shape (r, hidden).
    """
    down, up = read(update.down), read(update.up)
    return (update.scaling, down.T, up.T) if update.target_type == "embedding" else (update.scaling, up, down)


def _names_head(adapter: Adapter) -> bool:
    targets = adapter.config.get("target_modules")
    names = [targets] if isinstance(targets, str) else targets or []
    return bool(names) and all(str(name).rpartition(".")[2] in HEADS for name in names)


def _path(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part not in _PREFIXES)


def _wide(tensor: FileTensor) -> Array:
    value: Array = read(tensor).astype(np.float64)
    return value


def _stored_in_out(update: LowRank, shape: tuple[int, ...]) -> bool:
    """Whether the updated tensor is stored as (in, out) instead of (out, in).

    For a square linear layer, the shape is ambiguous, and the adapter's ``fan_in_fan_out`` setting decides.
    """
    if update.target_type != "linear":
        return update.target_type == "embedding"
    if shape[0] == shape[1]:
        return update.fan_in_fan_out
    return shape[0] == update.down.spec.shape[1]
