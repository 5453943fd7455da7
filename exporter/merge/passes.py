"""Passes: pure maps from spec to spec and from row block to row block. No file, no state, no knowledge of adapters."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from exporter.errors import BadInput
from exporter.tensors import FLOATS, Array, TensorSpec, cast


class Pass(Protocol):
    """One step between a stored tensor and its merged value."""

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """What ``apply`` makes of a tensor of ``spec``."""

    def apply(self, start: int, block: Array) -> Array:
        """The value of rows [start, start + len(block)), given the rows before this pass."""

    def touched(self, n_rows: int) -> list[tuple[int, int]]:
        """Row ranges [start, stop) that may differ from the input, ascending and disjoint."""


@dataclass(frozen=True, slots=True)
class Cast:
    """Floating-point tensors to ``dtype``, rounded once to nearest even; other tensors are left alone."""

    dtype: str

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """The same shape in the new dtype."""
        return replace(spec, dtype=self.dtype) if spec.dtype in FLOATS else spec

    def apply(self, start: int, block: Array) -> Array:
        """Raises BadInput if a finite value does not fit (float16 ends at 65504)."""
        out = cast(block, self.dtype)
        if self.dtype == "F16" and not np.isfinite(out).all():
            rows = f"rows {start} to {start + len(block) - 1}"
            raise BadInput(f"{rows}: expected values that F16 can hold (up to 65504), found a larger one")
        return out

    def touched(self, n_rows: int) -> list[tuple[int, int]]:
        """Every row."""
        return [(0, n_rows)]


@dataclass(frozen=True, slots=True)
class ReplaceRows:
    """Rows ``token_ids`` become ``rows``; the matrix grows to ``n_rows`` if it has fewer.

    token_ids: ascending and distinct. rows: (k, hidden) final values in the dtype of the tensor they go into.
    Source: PEFT's TrainableTokensLayer writes its rows with index_copy.
    """

    token_ids: tuple[int, ...]
    rows: Array
    n_rows: int

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """The same but for the number of rows."""
        return replace(spec, shape=(self.n_rows, *spec.shape[1:]))

    def apply(self, start: int, block: Array) -> Array:
        """A copy of the block with the rows in place; the block itself if none falls into it."""
        first = bisect_left(self.token_ids, start)
        last = bisect_left(self.token_ids, start + len(block))
        if first == last:
            return block
        out = block.copy()
        out[np.asarray(self.token_ids[first:last]) - start] = self.rows[first:last]
        return out

    def touched(self, n_rows: int) -> list[tuple[int, int]]:
        """Runs of consecutive ids."""
        runs: list[tuple[int, int]] = []
        for token_id in self.token_ids:
            if runs and runs[-1][1] == token_id:
                runs[-1] = (runs[-1][0], token_id + 1)
            else:
                runs.append((token_id, token_id + 1))
        return runs
