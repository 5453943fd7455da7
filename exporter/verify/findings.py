"""Measurements that a report shows beside its checks, to help people find the cause of a difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RowErrors:
    """Storage errors of the trained rows of one matrix, by token. Norms are Euclidean.

    use: embedding, encoder embedding or head.  storage: dtype or quantisation of the matrix.
    errors: ‖stored - new‖.  changes: ‖new - base‖; the whole norm of the row for a token that the base lacks.
    """

    use: str
    storage: str
    token_ids: Sequence[int]
    errors: Sequence[float]
    changes: Sequence[float]

    def shares(self) -> list[float]:
        """Error divided by change for each row; 0 for a row that training did not change."""
        return [error / change if change else 0.0 for error, change in zip(self.errors, self.changes, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the report."""
        return {
            "use": self.use,
            "storage": self.storage,
            "token_ids": list(self.token_ids),
            "errors": numbers(self.errors),
            "changes": numbers(self.changes),
        }


@dataclass(frozen=True, slots=True)
class Trace:
    """One sequence by position: token text, kind of position, KL in nats, largest difference between two logits."""

    words: Sequence[str]
    kinds: Sequence[str]
    kl: Sequence[float]
    max_abs: Sequence[float]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the report."""
        return {
            "words": list(self.words),
            "kinds": list(self.kinds),
            "kl": numbers(self.kl),
            "max_abs": numbers(self.max_abs),
        }


@dataclass(frozen=True, slots=True)
class Profile:
    """Measurements from running an artifact that have no limit.

    figures: kind of position (``all`` for every one) → name → value.  logits: some pairs (reference's, artifact's).
    """

    figures: Mapping[str, Mapping[str, float]]
    traces: Sequence[Trace]
    logits: Sequence[tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the report."""
        return {
            "figures": {
                position_kind: dict(zip(values, numbers(values.values()), strict=True))
                for position_kind, values in self.figures.items()
            },
            "traces": [trace.to_json() for trace in self.traces],
            "logits": {
                "reference": numbers(pair[0] for pair in self.logits),
                "artifact": numbers(pair[1] for pair in self.logits),
            },
        }


def numbers(values: Any) -> list[float | None]:
    """``values`` rounded to six digits; NaN and infinities, which JSON lacks, become None."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
