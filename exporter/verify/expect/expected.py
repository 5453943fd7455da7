"""The expected values of one tensor of the tuned model.

The sums of base weights and adapter updates are computed row by row in float64. If an export tool merges in float32 and
rounds once, each value in the artifact differs from the expected value by at most one unit in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.edits import FullModule, LowRank
from exporter.tensors import Array
from exporter.verify.by_peft.recomputed import Recomputed
from exporter.verify.expect.products import bias, change, magnitudes


@dataclass
class Expected:
    """The expected values of one tensor of the tuned model.

    base: the tensor in the base checkpoint. full: the adapter's tensor that replaces ``base`` as a whole, or None.
    rows: a dict from token id to the trained row in the adapters. updates: low-rank updates that are added to the
    tensor. biases: if the tensor is a bias, the low-rank updates with a LoRA bias that is added to the tensor.
    zero_columns: the number of zero columns that are appended to the tensor for new token ids. kept: the
    number of rows that remain if the vocabulary was reduced, else None.
    """

    base: FileTensor
    full: FullModule | None = None
    rows: dict[int, Array] = field(default_factory=dict)
    updates: list[LowRank] = field(default_factory=list)
    biases: list[LowRank] = field(default_factory=list)
    zero_columns: int = 0
    kept: int | None = None

    @property
    def changed(self) -> bool:
        """Whether any adapter changes the tensor."""
        other = self.updates or self.biases or self.zero_columns or self.kept is not None
        return bool(self.full or self.rows or other)

    @property
    def computed(self) -> bool:
        """Whether the expected values are sums of base and updates, for which small rounding errors are allowed."""
        return bool(self.updates or self.biases or isinstance(self.full, Recomputed))

    @property
    def source(self) -> FileTensor:
        """The base tensor or, if an adapter replaces the base tensor as a whole, the adapter's tensor."""
        return self.full.tensor if self.full else self.base

    @property
    def n_rows(self) -> int:
        """The number of rows of the tuned tensor."""
        if self.kept is not None:
            return self.kept
        return max([self.source.spec.n_rows, *(token_id + 1 for token_id in self.rows)])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tuned tensor."""
        if not self.source.spec.shape:
            return ()
        rest = self.source.spec.shape[1:]
        return (self.n_rows, *(rest if not self.zero_columns else (rest[0] + self.zero_columns,)))

    def values(self, ids: Sequence[int]) -> Array:
        """Return the expected values of the rows ``ids`` as a float64 array of shape (n, ...).

        If neither the base nor an adapter contains a row, the values of the row are NaN.
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
            out += update.scaling * bias(update, ids)
        return np.pad(out, [(0, 0), (0, self.zero_columns)]) if self.zero_columns else out

    def _updated(self, value: Array, update: LowRank, ids: Sequence[int]) -> Array:
        if update.target_type == "convolution":
            # A convolution is a matrix with one column for each input channel and place of the kernel.
            shape = (self.source.spec.n_rows, math.prod(self.source.spec.shape[1:]))
            return self._added(value.reshape(len(ids), -1), update, ids, shape).reshape(value.shape)
        return self._added(value, update, ids, self.source.spec.shape)

    def _added(self, value: Array, update: LowRank, ids: Sequence[int], shape: tuple[int, ...]) -> Array:
        value = value + update.scaling * change(update, shape, ids)
        if update.magnitude is None:
            return value
        gain, by_column = magnitudes(update, shape)
        if by_column:
            factors: Array = gain / self._column_norms(update)
        else:
            factors = (gain[list(ids)] / np.linalg.norm(value, axis=1))[:, None]
        scaled: Array = value * np.where(np.isnan(factors), 1.0, factors)
        return scaled

    def _column_norms(self, update: LowRank) -> Array:
        spec = self.source.spec
        total = np.zeros(spec.shape[1])
        for start in range(0, spec.n_rows, 1024):
            ids = range(start, min(start + 1024, spec.n_rows))
            block = self.source.rows(ids.start, ids.stop).astype(np.float64)
            total += np.square(block + update.scaling * change(update, spec.shape, ids)).sum(axis=0)
        norms: Array = np.sqrt(total)
        return norms
