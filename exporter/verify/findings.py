"""Measurements beside the checks of a report: what a person looks at to see where a difference comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RowErrors:
    """Of one use (embedding or head), by token: ``errors`` ‖stored - new‖ and ``changes`` ‖new - base‖, Euclidean.

    A token that the base does not have changed by all of its row. ``kind``: how the matrix is stored.
    """

    use: str
    kind: str
    token_ids: Sequence[int]
    errors: Sequence[float]
    changes: Sequence[float]

    def shares(self) -> list[float]:
        """Error over change; a row that training left as it was has nothing to lose."""
        return [error / change if change else 0.0 for error, change in zip(self.errors, self.changes, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """As it stands in the document."""
        return {
            "use": self.use,
            "storage": self.kind,
            "token_ids": list(self.token_ids),
            "errors": numbers(self.errors),
            "changes": numbers(self.changes),
        }


@dataclass(frozen=True, slots=True)
class Trace:
    """One sequence: its tokens as text, and by position the kind, the KL in nats and the largest logit difference."""

    words: Sequence[str]
    kinds: Sequence[str]
    kl: Sequence[float]
    max_abs: Sequence[float]

    def to_json(self) -> dict[str, Any]:
        """As it stands in the document."""
        return {
            "words": list(self.words),
            "kinds": list(self.kinds),
            "kl": numbers(self.kl),
            "max_abs": numbers(self.max_abs),
        }


@dataclass(frozen=True, slots=True)
class Profile:
    """What running an artifact showed beside its gates.

    figures: kind of position (``all`` for every one) → name → value.  logits: some pairs (reference's, artifact's).
    """

    figures: Mapping[str, Mapping[str, float]]
    traces: Sequence[Trace]
    logits: Sequence[tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        """As it stands in the document."""
        return {
            "figures": {
                kind: dict(zip(found, numbers(found.values()), strict=True)) for kind, found in self.figures.items()
            },
            "traces": [trace.to_json() for trace in self.traces],
            "logits": {
                "reference": numbers(pair[0] for pair in self.logits),
                "artifact": numbers(pair[1] for pair in self.logits),
            },
        }


def numbers(values: Any) -> list[float | None]:
    """Six digits are more than anybody reads; JSON has no NaN or Infinity, so those are null."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
