"""Passes: pure functions from spec to spec and from row block to row block, without state, adapters or files."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from exporter.errors import BadInput
from exporter.tensors import FLOATS, Array, TensorSpec, cast


class Pass(Protocol):
    """One step between a stored tensor and its merged value."""

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """The spec of the result of ``apply`` for a tensor of ``spec``."""

    def apply(self, start: int, block: Array) -> Array:
        """The result for rows [start, start + len(block)); ``block``: these rows before this pass."""

    def touched(self, n_rows: int) -> list[tuple[int, int]]:
        """Row ranges [start, stop) that may differ from the input, ascending and disjoint."""


class _Everywhere:
    """A pass that may change every row."""

    __slots__ = ()

    def touched(self, n_rows: int) -> list[tuple[int, int]]:
        """Every row."""
        return [(0, n_rows)]


@dataclass(frozen=True, slots=True)
class Cast(_Everywhere):
    """Floating-point tensors to ``dtype``, rounded once to nearest even; other tensors stay as they are.

    finite: also refuse NaN and Inf of the input, as for values of an adapter.
    """

    dtype: str
    finite: bool = False

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """The same shape in the new dtype."""
        return replace(spec, dtype=self.dtype) if spec.dtype in FLOATS else spec

    def apply(self, start: int, block: Array) -> Array:
        """Raises BadInput for a value beyond float16's 65504, with ``finite`` for any NaN or Inf."""
        out = cast(block, self.dtype)
        if self.finite and not np.isfinite(cast(block, "F32")).all():
            raise BadInput(f"{_rows(start, out)}: expected finite values, found NaN or Inf")
        if self.dtype == "F16":
            _require_f16(start, out)
        return out


@dataclass(frozen=True, slots=True)
class ReplaceRows:
    """Rows ``token_ids`` become ``rows``; the matrix gets ``n_rows`` rows.

    token_ids: ascending and distinct. rows: (k, hidden) final values in the dtype of the target tensor.
    Source: PEFT's TrainableTokensLayer writes its rows with index_copy.
    """

    token_ids: tuple[int, ...]
    rows: Array
    n_rows: int

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """The same spec with ``n_rows`` rows."""
        return replace(spec, shape=(self.n_rows, *spec.shape[1:]))

    def apply(self, start: int, block: Array) -> Array:
        """A copy of the block with the new rows; the block itself if it contains none of them."""
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


@dataclass(frozen=True, slots=True)
class Term:
    """One update in stored orientation: left (rows, r), already scaled, times right (r, columns), float32.

    Of a stack: left (experts, rows, r), right (experts, r, columns).

    gain: DoRA's magnitude, (rows,) if ``by_row``, else (columns,). norm: the norms of the columns of W + left @ right,
    which one block of rows does not determine; None if ``by_row``.
    """

    left: Array
    right: Array
    gain: Array | None = None
    by_row: bool = True
    norm: Array | None = None


@dataclass(frozen=True, slots=True)
class AddLowRank(_Everywhere):
    """W + sum of updates, in float32 (float64 for a float64 tensor), then rounded once to ``dtype``.

    terms: reads the updates on first use, so that a plan keeps none in memory. A DoRA update rescales W itself and is
    therefore the only term. Sources: LoRA (Hu et al. 2021), DoRA (Liu et al. 2024) equation 5, as PEFT computes both.
    """

    terms: Callable[[], Sequence[Term]]
    dtype: str

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """The same shape in ``dtype``."""
        return replace(spec, dtype=self.dtype)

    def apply(self, start: int, block: Array) -> Array:
        """Raises BadInput if the result does not fit ``dtype``."""
        wide = "F64" if block.dtype == np.float64 else "F32"
        value = cast(block, wide)
        value = value.copy() if value is block else value
        for term in self.terms():
            stop = start + len(block)
            value += term.left[start:stop] @ (term.right if term.right.ndim == 2 else term.right[start:stop])
            if term.gain is not None:
                value *= _dora(term, start, value)
        out = cast(value, self.dtype)
        if not np.isfinite(value).all():
            raise BadInput(f"{_rows(start, out)}: expected a finite sum of base and update, found NaN or Inf")
        if self.dtype == "F16":
            _require_f16(start, out)
        return out


@dataclass(frozen=True, slots=True)
class AddVector(_Everywhere):
    """A bias plus the adapter's bias. added: (n,) float32, scaled."""

    added: Array
    dtype: str

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """The same shape in ``dtype``."""
        return replace(spec, dtype=self.dtype)

    def apply(self, start: int, block: Array) -> Array:
        """The sum in float32, rounded once."""
        return cast(cast(block, "F32") + self.added[start : start + len(block)], self.dtype)


def _dora(term: Term, start: int, value: Array) -> Array:
    """DoRA's factors for a block of W + left @ right: (n, 1) by row, (columns,) by column."""
    assert term.gain is not None
    if term.by_row:
        gain = term.gain[start : start + len(value)]
        factors: Array = (gain / np.sqrt(np.einsum("ij,ij->i", value, value)))[:, None]
    else:
        assert term.norm is not None
        factors = term.gain / term.norm
    return factors


def _require_f16(start: int, out: Array) -> None:
    if not np.isfinite(out).all():
        raise BadInput(f"{_rows(start, out)}: expected values that F16 can hold (up to 65504), found a larger one")


def _rows(start: int, block: Array) -> str:
    return f"rows {start} to {start + len(block) - 1}"
