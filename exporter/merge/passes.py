"""Defines the passes of a merge.

A pass is a pure function that changes blocks of tensor rows, such as a cast to a different dtype.

A pass has no state and reads neither adapters nor files.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from exporter.errors import BadInput
from exporter.tensors import DTYPES, FLOATS, Array, TensorSpec, cast


class Pass(Protocol):
    """A step of the computation that turns a stored tensor into the merged tensor."""

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """Return the dtype and shape of the pass's output, for an input with the dtype and shape ``spec``."""

    def apply(self, start: int, block: Array) -> Array:
        """Apply the pass to ``block``, which contains the rows [start, start + len(block)) of the tensor."""

    def touched(self, n_rows: int) -> list[tuple[int, int]]:
        """Return ascending, disjoint ranges [start, stop) of the rows that the pass may change."""


class _Everywhere:
    """Base class of passes that may change every row of a tensor."""

    __slots__ = ()

    def touched(self, n_rows: int) -> list[tuple[int, int]]:
        """Return a single range that covers all rows."""
        return [(0, n_rows)]


@dataclass(frozen=True, slots=True)
class Cast(_Everywhere):
    """Cast a floating-point tensor to ``dtype``, rounding once to nearest even.

    Tensors with other dtypes, such as integers, stay unchanged. finite: whether to raise an error for NaN and Inf in
    the input, as for values from an adapter.
    """

    dtype: str
    finite: bool = False

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """Return ``spec`` with the new dtype if the tensor is floating-point, else ``spec`` unchanged."""
        return replace(spec, dtype=self.dtype) if spec.dtype in FLOATS else spec

    def apply(self, start: int, block: Array) -> Array:
        """Cast ``block``.

        Raises BadInput for a value beyond the maximum of float16 (65504) and, if ``finite`` is set, for NaN and Inf.
        """
        out = cast(block, self.dtype)
        if self.finite and not np.isfinite(cast(block, "F32")).all():
            raise BadInput(f"{_rows(start, out)}: expected finite values, found NaN or Inf")
        if self.dtype == "F16":
            _require_f16(start, out)
        return out


@dataclass(frozen=True, slots=True)
class ReplaceRows:
    """Replace the rows ``token_ids`` of a matrix with ``rows``, and resize the matrix to ``n_rows`` rows.

    token_ids: the token ids of the replaced rows, in ascending order without duplicates. rows: the new rows with shape
    (len(token_ids), hidden size), in the dtype of the merged tensor. As in PEFT's TrainableTokensLayer, which calls
    index_copy, new rows replace the stored rows and are not added to the stored rows.
    """

    token_ids: tuple[int, ...]
    rows: Array
    n_rows: int

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """Return ``spec`` with ``n_rows`` rows."""
        return replace(spec, shape=(self.n_rows, *spec.shape[1:]))

    def apply(self, start: int, block: Array) -> Array:
        """Return a copy of ``block`` with the new rows, or ``block`` itself if no row of ``block`` is replaced."""
        first = bisect_left(self.token_ids, start)
        last = bisect_left(self.token_ids, start + len(block))
        if first == last:
            return block
        out = block.copy()
        out[np.asarray(self.token_ids[first:last]) - start] = self.rows[first:last]
        return out

    def touched(self, n_rows: int) -> list[tuple[int, int]]:
        """Return the ids of the replaced rows as ascending ranges [start, stop)."""
        runs: list[tuple[int, int]] = []
        for token_id in self.token_ids:
            if runs and runs[-1][1] == token_id:
                runs[-1] = (runs[-1][0], token_id + 1)
            else:
                runs.append((token_id, token_id + 1))
        return runs


def first_rows(spec: TensorSpec, dtype: str, n_rows: int) -> ReplaceRows:
    """Return the pass that keeps only the first ``n_rows`` rows of a tensor with the dtype ``dtype``."""
    return ReplaceRows((), np.empty((0, *spec.shape[1:]), DTYPES[dtype]), n_rows)


@dataclass(frozen=True, slots=True)
class AppendColumns(_Everywhere):
    """Append ``count`` columns of zeros to a matrix."""

    count: int

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """Return ``spec`` with ``count`` more columns."""
        return replace(spec, shape=(spec.shape[0], spec.shape[1] + self.count))

    def apply(self, start: int, block: Array) -> Array:
        """Return ``block`` with ``count`` columns of zeros appended."""
        return np.concatenate([block, np.zeros((len(block), self.count), block.dtype)], axis=1)


@dataclass(frozen=True, slots=True)
class Term:
    """A low-rank update left @ right in float32, in the orientation of the stored tensor.

    left: the scaled left factor with shape (rows, rank), or (experts, rows, rank) for a stack of experts. right: the
    right factor with shape (rank, columns), or (experts, rank, columns) for a stack of experts. gain: DoRA's magnitude
    vector, or None for LoRA. by_row: whether DoRA scales each row instead of each column of the stored tensor. norm: if
    DoRA scales columns, the column norms of stored tensor + left @ right. The column norms are computed in advance,
    because a block of rows does not contain whole columns.
    """

    left: Array
    right: Array
    gain: Array | None = None
    by_row: bool = True
    norm: Array | None = None


@dataclass(frozen=True, slots=True)
class AddLowRank(_Everywhere):
    """Add updates to a weight in float32 (float64 for a float64 tensor), then round the sum once to ``dtype``.

    terms: a function that reads and returns the updates. The function ``terms`` is called only when the first rows are
    computed, so that a merge plan keeps no update in memory. A DoRA update also rescales the weight; therefore no
    second update may change the same weight. Sources: LoRA (Hu et al. 2021), and DoRA (Liu et al. 2024) equation 5, as
    computed by PEFT.
    """

    terms: Callable[[], Sequence[Term]]
    dtype: str

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """Return ``spec`` with the dtype to which this pass rounds the sum."""
        return replace(spec, dtype=self.dtype)

    def apply(self, start: int, block: Array) -> Array:
        """Add the updates to the rows in ``block``. Raises BadInput if a sum is outside the range of ``dtype``."""
        wide = "F64" if block.dtype == np.float64 else "F32"
        value = cast(block, wide)
        value = value.copy() if value is block else value
        for term in self.terms():
            stop = start + len(block)
            if term.right.ndim == 2:
                value = value.reshape(len(block), -1)
            value += term.left[start:stop] @ (term.right if term.right.ndim == 2 else term.right[start:stop])
            if term.gain is not None:
                value *= _dora(term, start, value)
        out = cast(value.reshape(block.shape), self.dtype)
        if not np.isfinite(value).all():
            raise BadInput(f"{_rows(start, out)}: expected a finite sum of base and update, found NaN or Inf")
        if self.dtype == "F16":
            _require_f16(start, out)
        return out


@dataclass(frozen=True, slots=True)
class AddVector(_Everywhere):
    """Add the bias vector of an adapter's update to a bias of the base model.

    added: the scaled bias of the adapter as a float64 vector. dtype: dtype of the sum.
    """

    added: Array
    dtype: str

    def out_spec(self, spec: TensorSpec) -> TensorSpec:
        """Return ``spec`` with the dtype to which this pass rounds the sum."""
        return replace(spec, dtype=self.dtype)

    def apply(self, start: int, block: Array) -> Array:
        """Return the sum of the base model's bias and the adapter's bias, computed in float64 and rounded once.

        In float32, the rounding error of a sum of two numbers of opposite sign could be many times the last place of
        the sum. Raises BadInput if a sum is outside the range of float16 and ``dtype`` is float16.
        """
        out = cast(cast(block, "F64") + self.added[start : start + len(block)], self.dtype)
        if self.dtype == "F16":
            _require_f16(start, out)
        return out


def _dora(term: Term, start: int, value: Array) -> Array:
    """Return the factors by which DoRA scales ``value``, a block of rows of stored tensor + left @ right."""
    assert term.gain is not None
    gain = term.gain
    if term.by_row:
        gain = term.gain[start : start + len(value)]
        factors: Array = (gain / np.sqrt(np.einsum("ij,ij->i", value, value)))[:, None]
    else:
        assert term.norm is not None
        factors = term.gain / term.norm
    # A tensor may fuse several modules, and rows of other modules have no magnitude.
    unscaled = np.isnan(gain)[:, None] if term.by_row else np.isnan(term.gain)
    return np.where(unscaled, np.float32(1), factors) if unscaled.any() else factors


def _require_f16(start: int, out: Array) -> None:
    if not np.isfinite(out).all():
        raise BadInput(f"{_rows(start, out)}: expected values up to 65504, the maximum of F16, found a larger value")


def _rows(start: int, block: Array) -> str:
    return f"rows {start} to {start + len(block) - 1}"
