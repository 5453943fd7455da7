"""Measurements that a report contains beside its checks, for finding the cause of a difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RowErrors:
    """Storage errors of the trained rows of one matrix, one error per token. All norms are Euclidean.

    use: use of the matrix, "embedding", "encoder embedding" or "head".  storage: dtype or quantisation type of the
    matrix.
    errors: norm ‖stored - new‖ of each row.  changes: norm ‖new - base‖ of each row, or ‖new‖ for a token that is not
    in the base.
    """

    use: str
    storage: str
    token_ids: Sequence[int]
    errors: Sequence[float]
    changes: Sequence[float]

    def shares(self) -> list[float]:
        """For each row, the storage error divided by the change, or 0 for a row that training did not change."""
        return [error / change if change else 0.0 for error, change in zip(self.errors, self.changes, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """The JSON object for report.json."""
        return {
            "use": self.use,
            "storage": self.storage,
            "token_ids": list(self.token_ids),
            "errors": numbers(self.errors),
            "changes": numbers(self.changes),
        }


@dataclass(frozen=True, slots=True)
class Trace:
    """Measurements at every position of one token sequence.

    words: text of each token.  kinds: kind of each position.  kl: KL divergence in nats.
    max_abs: largest difference between a logit of the artifact and the same logit of the reference.
    """

    words: Sequence[str]
    kinds: Sequence[str]
    kl: Sequence[float]
    max_abs: Sequence[float]

    def to_json(self) -> dict[str, Any]:
        """The JSON object for report.json."""
        return {
            "words": list(self.words),
            "kinds": list(self.kinds),
            "kl": numbers(self.kl),
            "max_abs": numbers(self.max_abs),
        }


@dataclass(frozen=True, slots=True)
class Profile:
    """Measurements without a limit, taken from running an artifact.

    figures: kind of position (``all`` for all positions) → name of a measurement → value.
    logits: sampled pairs (logit of the reference, logit of the artifact).
    """

    figures: Mapping[str, Mapping[str, float]]
    traces: Sequence[Trace]
    logits: Sequence[tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        """The JSON object for report.json."""
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
    """Round ``values`` to six digits. NaN and infinities become None, because JSON cannot represent them."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
