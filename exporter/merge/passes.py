"""Passes: pure functions on specs and on blocks of rows. A pass has no state and does not access adapters or files."""

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
        """The spec of the result of ``apply`` for a tensor with ``spec``."""

    def apply(self, start: int, block: Array) -> Array:
        """The result of the pass for the rows [start, start + len(block)).

        ``block`` contains the rows before the pass.
        """

    def touched(self, n_rows: int) -> list[tuple[int, int]]:
        """Ranges [start, stop) of rows that the pass may change, ascending and disjoint."""


class _Everywhere:
    """A pass that may change every row."""

    __slots__ = ()

    def touched(self, n_rows: int) -> list[tuple[int, int]]:
        """One range with all rows."""
        return [(0, n_rows)]


@dataclass(frozen=True, slots=True)
class Cast(_Everywhere):
    """Cast floating-point tensors to ``dtype``, rounding once to nearest even. All other tensors stay unchanged.

    finite: whether to refuse NaN and Inf in the input. Set for values of an adapter.
    """

    dtype: str
    finite: bool = False

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """The same spec with the new dtype, if the tensor is a floating-point tensor."""
        return replace(spec, dtype=self.dtype) if spec.dtype in FLOATS else spec

    def apply(self, start: int, block: Array) -> Array:
        """Cast ``block``.

        Raises BadInput for a value beyond float16's maximum of 65504, and, if ``finite`` is set, for NaN and Inf.
        """
        out = cast(block, self.dtype)
        if self.finite and not np.isfinite(cast(block, "F32")).all():
            raise BadInput(f"{_rows(start, out)}: expected finite values, found NaN or Inf")
        if self.dtype == "F16":
            _require_f16(start, out)
        return out


@dataclass(frozen=True, slots=True)
class ReplaceRows:
    """Replace the rows ``token_ids`` with ``rows``, and give the matrix ``n_rows`` rows.

    token_ids: ascending, distinct ids. rows: final values with shape (k, hidden), in the dtype of the target tensor.
    Source: PEFT's TrainableTokensLayer writes its rows with index_copy.
    """

    token_ids: tuple[int, ...]
    rows: Array
    n_rows: int

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """The same spec with ``n_rows`` rows."""
        return replace(spec, shape=(self.n_rows, *spec.shape[1:]))

    def apply(self, start: int, block: Array) -> Array:
        """A copy of ``block`` with the new rows, or ``block`` itself if no new row belongs to the block."""
        first = bisect_left(self.token_ids, start)
        last = bisect_left(self.token_ids, start + len(block))
        if first == last:
            return block
        out = block.copy()
        out[np.asarray(self.token_ids[first:last]) - start] = self.rows[first:last]
        return out

    def touched(self, n_rows: int) -> list[tuple[int, int]]:
        """Ranges of consecutive token ids."""
        runs: list[tuple[int, int]] = []
        for token_id in self.token_ids:
            if runs and runs[-1][1] == token_id:
                runs[-1] = (runs[-1][0], token_id + 1)
            else:
                runs.append((token_id, token_id + 1))
        return runs


@dataclass(frozen=True, slots=True)
class Term:
    """One update left @ right in the orientation of the stored tensor, in float32.

    left: (rows, r), already scaled; (experts, rows, r) for a stack. right: (r, columns); (experts, r, columns) for a
    stack. gain: DoRA's magnitude, with shape (rows,) if ``by_row`` is set, else (columns,). norm: norms of the columns
    of W + left @ right, or None if ``by_row`` is set. The norms are stored because a block of rows does not determine
    the norm of a column.
    """

    left: Array
    right: Array
    gain: Array | None = None
    by_row: bool = True
    norm: Array | None = None


@dataclass(frozen=True, slots=True)
class AddLowRank(_Everywhere):
    """Add updates to W in float32 (float64 for a float64 tensor), then round the sum once to ``dtype``.

    terms: returns the updates. The updates are read on first use, so that a plan keeps no update in memory. A DoRA
    update rescales W and is therefore the only term. Sources: LoRA (Hu et al. 2021), and DoRA (Liu et al. 2024)
    equation 5, as computed by PEFT.
    """

    terms: Callable[[], Sequence[Term]]
    dtype: str

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """The same spec with ``dtype``."""
        return replace(spec, dtype=self.dtype)

    def apply(self, start: int, block: Array) -> Array:
        """Add the updates to ``block``. Raises BadInput if a result is outside the range of ``dtype``."""
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
    """Add an adapter's bias to a bias. added: the scaled bias of the adapter, (n,) float32."""

    added: Array
    dtype: str

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """The same spec with ``dtype``."""
        return replace(spec, dtype=self.dtype)

    def apply(self, start: int, block: Array) -> Array:
        """The sum, computed in float32 and rounded once."""
        return cast(cast(block, "F32") + self.added[start : start + len(block)], self.dtype)


def _dora(term: Term, start: int, value: Array) -> Array:
    """DoRA's factors for a block of W + left @ right, with shape (n, 1) if ``by_row`` is set, else (columns,)."""
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
        raise BadInput(f"{_rows(start, out)}: expected values up to 65504, the maximum of F16, found a larger value")


def _rows(start: int, block: Array) -> str:
    return f"rows {start} to {start + len(block) - 1}"
