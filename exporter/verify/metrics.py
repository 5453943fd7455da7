"""Distances between two arrays of logits, both (positions, vocabulary) in float32 or wider."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from exporter.tensors import Array


@dataclass(frozen=True, slots=True)
class Distance:
    """kl: mean over positions of KL(want ‖ got) in nats. misses: positions whose best token is another one."""

    kl: float
    kl_max: float
    misses: int
    max_abs: float
    positions: int


def compare(want: Array, got: Array) -> Distance:
    """Distance of ``got`` from ``want``; any NaN makes every figure NaN, which no gate lets pass."""
    if want.shape != got.shape:
        raise ValueError(f"logits of shape {want.shape} against {got.shape}")
    if not np.isfinite(got).all():
        return Distance(np.nan, np.nan, len(want), np.nan, len(want))
    kl = np.empty(len(want))
    same = np.empty(len(want), bool)
    worst = 0.0
    for position, (one, other) in enumerate(zip(want, got, strict=True)):
        p, q = _log_softmax(one), _log_softmax(other)
        kl[position] = np.sum(np.exp(p) * (p - q))
        same[position] = _same_argmax(one, other)
        worst = max(worst, float(np.abs(one.astype(np.float64) - other).max()))
    return Distance(float(kl.mean()), float(kl.max()), int((~same).sum()), worst, len(want))


def pool(distances: list[Distance]) -> Distance:
    """The distance over all positions of several texts."""
    counts = np.array([one.positions for one in distances], np.float64)
    weights = counts / counts.sum()
    return Distance(
        float(np.dot(weights, [one.kl for one in distances])),
        float(np.max([one.kl_max for one in distances])),
        sum(one.misses for one in distances),
        float(np.max([one.max_abs for one in distances])),
        int(counts.sum()),
    )


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max()
    result: Array = shifted - np.log(np.exp(shifted).sum())
    return result


def _same_argmax(want: Array, got: Array) -> bool:
    """The runtime's favourite is one of the reference's: equal logits have no order between them."""
    return bool(want[int(got.argmax())] == want.max())
