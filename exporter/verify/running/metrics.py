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
    """Figures by position, each (positions,) float64, and what they come to over all positions.

    kl_at: KL(want ‖ got) in nats.  max_abs_at: largest difference of two logits.  top1_at: 1 where the best token of
    got is one of want's best.  top5_at: share of got's five best that are among want's.  surprise_at: (positions, 2),
    -log p of the token that follows, under want and under got; NaN where none follows.
    """

    kl_at: Array
    max_abs_at: Array
    top1_at: Array
    top5_at: Array
    surprise_at: Array

    @property
    def positions(self) -> int:
        """How many there are."""
        return len(self.kl_at)

    @property
    def kl(self) -> float:
        """Mean over positions."""
        return float(self.kl_at.mean())

    @property
    def kl_median(self) -> float:
        """Half of the positions are nearer."""
        return float(np.median(self.kl_at))

    @property
    def kl_p99(self) -> float:
        """99 of 100 positions are nearer."""
        return float(np.quantile(self.kl_at, 0.99))

    @property
    def kl_max(self) -> float:
        """The farthest position."""
        return float(self.kl_at.max())

    @property
    def misses(self) -> int:
        """Positions whose best token is another one."""
        return int((self.top1_at == 0).sum())

    @property
    def max_abs(self) -> float:
        """Over all positions and tokens."""
        return float(self.max_abs_at.max())

    @property
    def perplexities(self) -> tuple[float, float]:
        """Of want and of got, on the tokens that follow; NaN if none does."""
        known = self.surprise_at[~np.isnan(self.surprise_at[:, 0])]
        if not len(known):
            return np.nan, np.nan
        with np.errstate(over="ignore"):  # a broken model's may be beyond any number
            want, got = np.exp(known.mean(axis=0))
        return float(want), float(got)

    def figures(self) -> dict[str, float]:
        """Everything that is reported, by its name."""
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
    """Distance of ``got`` from ``want``; any NaN makes every figure NaN, which no gate lets pass.

    ids: the sequence itself, if perplexities are wanted; a token without a column is not counted.
    """
    if want.shape != got.shape:
        raise ValueError(f"logits of shape {want.shape} against {got.shape}")
    count, vocab = want.shape
    kl, worst, top1, top5 = (np.full(count, np.nan) for _ in range(4))
    surprise = np.full((count, 2), np.nan)
    if not np.isfinite(got).all():
        return Distance(kl, worst, np.zeros(count), np.zeros(count), surprise)
    follows = [*ids[1:], vocab][:count] if ids else [vocab] * count
    for position, (one, other) in enumerate(zip(want, got, strict=True)):
        p, q = _log_softmax(one), _log_softmax(other)
        kl[position] = np.sum(np.exp(p) * (p - q))
        worst[position] = np.abs(one.astype(np.float64) - other).max()
        top1[position] = one[int(other.argmax())] == one.max()
        top5[position] = _shared_best(one, other)
        if (token := follows[position]) < vocab:
            surprise[position] = -p[token], -q[token]
    return Distance(kl, worst, top1, top5, surprise)


def pool(distances: Sequence[Distance]) -> Distance:
    """The distance over all positions of several texts."""
    parts = ([getattr(one, field.name) for one in distances] for field in fields(Distance))
    return Distance(*(np.concatenate(part) for part in parts))


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max()
    result: Array = shifted - np.log(np.exp(shifted).sum())
    return result


def _shared_best(want: Array, got: Array) -> float:
    """Equal logits have no order between them: a favourite counts if it is as good as want's fifth."""
    few = min(_FEW, len(want))
    threshold = np.partition(want, -few)[-few]
    return float((want[np.argpartition(got, -few)[-few:]] >= threshold).mean())
