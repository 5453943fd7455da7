"""Distances between two arrays of logits, both (positions, vocabulary) in float32 or wider."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np

from exporter.tensors import Array

_FEW: Final = 5


@dataclass(frozen=True, slots=True)
class Distance:
    """Figures by position, each (positions,) float64, and their summaries over all positions.

    kl_at: KL(want ‖ got) in nats.  max_abs_at: largest difference between two logits.  top1_at: 1 where the best token
    of got is one of want's best.  top5_at: share of got's five best that are among want's.  surprise_at: (positions,
    2), -log p of the next token, under want and under got; NaN where there is none.
    """

    kl_at: Array
    max_abs_at: Array
    top1_at: Array
    top5_at: Array
    surprise_at: Array

    @property
    def positions(self) -> int:
        """Number of positions."""
        return len(self.kl_at)

    @property
    def kl(self) -> float:
        """Mean KL over positions."""
        return float(self.kl_at.mean())

    @property
    def kl_median(self) -> float:
        """Median KL."""
        return float(np.median(self.kl_at))

    @property
    def kl_p99(self) -> float:
        """99th percentile of the KL."""
        return float(np.quantile(self.kl_at, 0.99))

    @property
    def kl_max(self) -> float:
        """Largest KL."""
        return float(self.kl_at.max())

    @property
    def misses(self) -> int:
        """Number of positions with another top-1 token."""
        return int((self.top1_at == 0).sum())

    @property
    def max_abs(self) -> float:
        """Largest difference between two logits, over all positions and tokens."""
        return float(self.max_abs_at.max())

    @property
    def perplexities(self) -> tuple[float, float]:
        """Perplexity of the next tokens under want and under got; NaN if there are none."""
        known = self.surprise_at[~np.isnan(self.surprise_at[:, 0])]
        if not len(known):
            return np.nan, np.nan
        with np.errstate(over="ignore"):  # that of a broken model may overflow
            want, got = np.exp(known.mean(axis=0))
        return float(want), float(got)

    def figures(self) -> dict[str, float]:
        """The figures of a report, by name."""
        want, got = self.perplexities
        return {
            "positions": float(self.positions),
            "mean KL": self.kl,
            "KL p99": self.kl_p99,
            "KL max": self.kl_max,
            "top-1": float(self.top1_at.mean()),
            "top-5": float(self.top5_at.mean()),
            "perplexity": want,
            "perplexity difference": got - want,
            "max abs": self.max_abs,
        }

    def at(self, chosen: Array | slice) -> Distance:
        """The distance over some positions: a slice, or a mask (positions,)."""
        return Distance(*(getattr(self, field.name)[chosen] for field in fields(self)))


def compare(want: Array, got: Array, ids: Sequence[int] = ()) -> Distance:
    """Distance of ``got`` from ``want``; any NaN makes every figure NaN, which fails every check.

    want, got: (positions, vocabulary).  ids: the sequence, for perplexities; a token without a column is not counted.
    """
    if want.shape != got.shape:
        raise ValueError(f"logits of shape {want.shape} against {got.shape}")
    count, vocab = want.shape
    kl, worst, top1, top5 = (np.full(count, np.nan) for _ in range(4))
    surprise = np.full((count, 2), np.nan)
    if not np.isfinite(got).all():
        return Distance(kl, worst, np.zeros(count), np.zeros(count), surprise)
    follows = [*ids[1:], vocab][:count] if ids else [vocab] * count
    for position, (want_row, got_row) in enumerate(zip(want, got, strict=True)):
        p, q = _log_softmax(want_row), _log_softmax(got_row)
        kl[position] = np.sum(np.exp(p) * (p - q))
        worst[position] = np.abs(want_row.astype(np.float64) - got_row).max()
        top1[position] = want_row[int(got_row.argmax())] == want_row.max()
        top5[position] = _shared_best(want_row, got_row)
        if (token := follows[position]) < vocab:
            surprise[position] = -p[token], -q[token]
    return Distance(kl, worst, top1, top5, surprise)


def pool(distances: Sequence[Distance]) -> Distance:
    """The distance over all positions of several texts."""
    parts = ([getattr(distance, field.name) for distance in distances] for field in fields(Distance))
    return Distance(*(np.concatenate(part) for part in parts))


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max()
    result: Array = shifted - np.log(np.exp(shifted).sum())
    return result


def _shared_best(want: Array, got: Array) -> float:
    """Share of got's five best tokens that are among want's; with ties, those as good as want's fifth."""
    few = min(_FEW, len(want))
    threshold = np.partition(want, -few)[-few]
    return float((want[np.argpartition(got, -few)[-few:]] >= threshold).mean())
