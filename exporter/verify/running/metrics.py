"""Measure the distance between two arrays of logits with the shape (positions, vocabulary)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np

from exporter.tensors import Array

_FEW: Final = 5


@dataclass(frozen=True, slots=True)
class Distance:
    """Distances of the logits ``got`` from the logits ``want`` at each position, with summaries over all positions.

    Arrays without a documented shape are float64 arrays of shape (positions,).

    kl_at: KL(want ‖ got) in nats. max_abs_at: largest absolute difference between corresponding logits of ``got`` and
    ``want``.
    top1_at: 1 if the top-1 token of ``got`` has the highest logit in ``want`` (ties included), else 0.
    top5_at: share of the top-5 tokens of ``got`` that are also among the top-5 tokens of ``want``.
    surprise_at: array of shape (positions, 2) with -log p of the next token, computed from ``want`` and from ``got``,
    or NaN at positions without a next token.
    """

    kl_at: Array
    max_abs_at: Array
    top1_at: Array
    top5_at: Array
    surprise_at: Array

    @property
    def positions(self) -> int:
        """Number of compared positions."""
        return len(self.kl_at)

    @property
    def kl(self) -> float:
        """Mean KL divergence over all positions."""
        return float(self.kl_at.mean())

    @property
    def kl_median(self) -> float:
        """Median KL divergence over all positions."""
        return float(np.median(self.kl_at))

    @property
    def kl_p99(self) -> float:
        """99th percentile of the KL divergence over all positions."""
        return float(np.quantile(self.kl_at, 0.99))

    @property
    def kl_max(self) -> float:
        """Largest KL divergence over all positions."""
        return float(self.kl_at.max())

    @property
    def misses(self) -> int:
        """Number of positions where ``got`` and ``want`` have different top-1 tokens."""
        return int((self.top1_at == 0).sum())

    @property
    def max_abs(self) -> float:
        """Largest absolute difference between corresponding logits of ``got`` and ``want``."""
        return float(self.max_abs_at.max())

    @property
    def perplexities(self) -> tuple[float, float]:
        """Return the perplexities computed from ``want`` and from ``got``, or NaN if no position has a next token."""
        known = self.surprise_at[~np.isnan(self.surprise_at[:, 0])]
        if not len(known):
            return np.nan, np.nan
        with np.errstate(over="ignore"):  # the perplexity of a broken model may overflow
            want, got = np.exp(known.mean(axis=0))
        return float(want), float(got)

    def figures(self) -> dict[str, float]:
        """Return the mean, median and other summaries of the distances as a dict from name to number."""
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
        """Return the distances at the positions ``chosen``, a slice or a boolean mask of shape (positions,)."""
        return Distance(*(getattr(self, field.name)[chosen] for field in fields(self)))


def compare(want: Array, got: Array, ids: Sequence[int] = ()) -> Distance:
    """Return the distance of the logits ``got`` from the logits ``want``.

    If ``got`` contains a NaN, all summaries are NaN, so that every check fails.

    want, got: logits of shape (positions, vocabulary). ids: token ids of the sequence, needed for perplexities. If
    ``want`` and ``got`` have no column for a token id, the token is excluded from the perplexities.
    """
    if want.shape != got.shape:
        raise ValueError(f"expected logits of shape {want.shape}, found shape {got.shape}")
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
    """Combine the distances for several texts into one ``Distance`` over the positions of all texts."""
    parts = ([getattr(distance, field.name) for distance in distances] for field in fields(Distance))
    return Distance(*(np.concatenate(part) for part in parts))


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max()
    result: Array = shifted - np.log(np.exp(shifted).sum())
    return result


def _shared_best(want: Array, got: Array) -> float:
    """Return the share of the top-5 tokens of ``got`` that are also among the top-5 tokens of ``want``.

    Every token whose logit in ``want`` equals the fifth-highest logit counts as a top-5 token of ``want``.
    """
    few = min(_FEW, len(want))
    threshold = np.partition(want, -few)[-few]
    return float((want[np.argpartition(got, -few)[-few:]] >= threshold).mean())
