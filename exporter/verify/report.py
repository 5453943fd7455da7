"""Reports of verifications, as JSON and as text: checks with values and limits, and one verdict per artifact."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporter.errors import NotEquivalent
from exporter.verify.findings import Profile, RowErrors

#: Version of the JSON document. The version increases when a key is renamed or removed or changes its meaning.
SCHEMA: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The outcome of one check. ``value`` and ``limit`` are None for a check that measures no number."""

    name: str
    passed: bool
    value: float | None = None
    limit: float | None = None
    detail: str = ""

    @classmethod
    def at_most(cls, name: str, value: float, limit: float, detail: str = "") -> Check:
        """A check that passes if ``value`` is at most ``limit``. A NaN value fails."""
        return cls(name=name, passed=value <= limit, value=value, limit=limit, detail=detail)

    def to_json(self) -> dict[str, Any]:
        """The check as an object of the JSON document."""
        return {
            "name": self.name,
            "passed": self.passed,
            "value": _finite(self.value),
            "limit": self.limit,
            "detail": self.detail,
        }


@dataclass(frozen=True, slots=True)
class Skip:
    """A part of the verification that was skipped, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All checks of one artifact. ``facts`` are measurements without a limit, such as the effect of rounding.

    profile: measurements from running the artifact, or None if no model was run.
    """

    artifact: Path
    format: str
    level: str
    checks: Sequence[Check]
    facts: Mapping[str, float | str]
    skipped: Sequence[Skip] = ()
    rows: Sequence[RowErrors] = ()
    profile: Profile | None = None

    @property
    def passed(self) -> bool:
        """True if the report contains at least one check and every check passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if not check.passed]

    def verdict(self) -> str:
        """The result as one line of text.

        If a check failed, the line contains the first failed check, its value and limit, and the number of further
        failures.
        """
        if self.passed:
            return f"{self.artifact}: equivalent ({len(self.checks)} checks, {self.level})"
        if not self.checks:
            return f"{self.artifact}: not equivalent, because no check was run"
        first = self.failures[0]
        measured = "" if first.value is None else f": expected at most {first.limit:.3g}, found {first.value:.3g}"
        more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
        detail = f": {first.detail}" if first.detail else ""
        return f"{self.artifact}: not equivalent: {first.name}{measured}{detail}{more}"

    def to_json(self) -> dict[str, Any]:
        """The JSON object of one artifact, for the output of ``--json`` and for report.json."""
        return {
            "schema": SCHEMA,
            "artifact": str(self.artifact),
            "format": self.format,
            "level": self.level,
            "passed": self.passed,
            "checks": [check.to_json() for check in self.checks],
            "facts": {name: value if isinstance(value, str) else _finite(value) for name, value in self.facts.items()},
            "skipped": [{"name": skip.name, "reason": skip.reason} for skip in self.skipped],
            "rows": [errors.to_json() for errors in self.rows],
            "profile": self.profile.to_json() if self.profile else None,
        }


def document(reports: Sequence[Report], setting: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of report.json.

    setting: JSON objects for the environment, the reference and the file digests, or None to leave them out.
    """
    return {
        "schema": SCHEMA,
        "passed": all(report.passed for report in reports),
        **(setting or {}),
        "artifacts": [report.to_json() for report in reports],
    }


def to_bytes(content: Mapping[str, Any]) -> bytes:
    """The bytes of report.json."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def require_passed(reports: Sequence[Report]) -> None:
    """Raise NotEquivalent with the verdict of the first report that did not pass."""
    for report in reports:
        if not report.passed:
            raise NotEquivalent(report.verdict(), document(reports))


def _finite(value: float | None) -> float | str | None:
    """Replace NaN and infinities by their names, such as "nan", because JSON cannot represent these values."""
    return value if value is None or math.isfinite(value) else str(value)
