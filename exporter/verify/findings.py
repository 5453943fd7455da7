"""Measurements in a verification report that have no pass limit and help to explain a failed check."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RowErrors:
    """Storage errors of the trained token rows of one matrix, as Euclidean norms.

    use: what the model uses the matrix for: "embedding", "encoder embedding" or "head". storage: the dtype or
    quantisation type in which the artifact stores the matrix. token_ids: the token id of each trained row. errors: the
    norm ‖stored - trained‖ for each row. changes: the norm ‖trained - base‖ for each row, or ‖trained‖ for the row of a
    new token.
    """

    use: str
    storage: str
    token_ids: Sequence[int]
    errors: Sequence[float]
    changes: Sequence[float]

    def shares(self) -> list[float]:
        """Return each row's storage error divided by the row's change, or 0 for a row that training did not change."""
        return [error / change if change else 0.0 for error, change in zip(self.errors, self.changes, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Return the storage errors of the rows as a JSON object for report.json."""
        return {
            "use": self.use,
            "storage": self.storage,
            "token_ids": list(self.token_ids),
            "errors": numbers(self.errors),
            "changes": numbers(self.changes),
        }


@dataclass(frozen=True, slots=True)
class Trace:
    """Differences between the logits of the artifact and of the reference at every position of one token sequence.

    words: the text of the token at each position.
    kinds: the category of each position, from ``KINDS`` in running/prompts.py.
    kl: KL(reference ‖ artifact) at each position, in nats. max_abs: for each position, the largest absolute difference
    between corresponding logits of artifact and reference.
    """

    words: Sequence[str]
    kinds: Sequence[str]
    kl: Sequence[float]
    max_abs: Sequence[float]

    def to_json(self) -> dict[str, Any]:
        """Return the logit differences at every position of the sequence as a JSON object for report.json."""
        return {
            "words": list(self.words),
            "kinds": list(self.kinds),
            "kl": numbers(self.kl),
            "max_abs": numbers(self.max_abs),
        }


@dataclass(frozen=True, slots=True)
class Profile:
    """Measurements from running an artifact, which the report contains but does not compare with limits.

    figures: a dict that maps each category of positions (``all`` for all positions) to a dict from names of
    measurements to values.
    traces: the logit differences at every position, with one trace per token sequence.
    logits: a sample of pairs (logit of the reference, logit of the artifact).
    """

    figures: Mapping[str, Mapping[str, float]]
    traces: Sequence[Trace]
    logits: Sequence[tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        """Return the measurements from running the artifact as a JSON object for report.json."""
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
    """Round numbers to six significant digits for JSON, and replace NaN and infinities, which JSON lacks, by None."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
