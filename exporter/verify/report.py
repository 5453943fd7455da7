"""What a verification found: checks with their values and limits, one verdict, as JSON and as text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporter.errors import NotEquivalent
from exporter.verify.findings import Profile, RowErrors

#: Version of the JSON document; raised when a key changes its meaning or goes.
SCHEMA: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One gate: it passed or it did not. ``value`` and ``limit`` are None where the check is yes or no."""

    name: str
    passed: bool
    value: float | None = None
    limit: float | None = None
    detail: str = ""

    @classmethod
    def at_most(cls, name: str, value: float, limit: float, detail: str = "") -> Check:
        """Passes if ``value`` is at most ``limit``; NaN never is."""
        return cls(name=name, passed=value <= limit, value=value, limit=limit, detail=detail)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the document."""
        return {
            "name": self.name,
            "passed": self.passed,
            "value": _finite(self.value),
            "limit": self.limit,
            "detail": self.detail,
        }


@dataclass(frozen=True, slots=True)
class Skip:
    """A part of the proof that was not done here, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All checks of one artifact. ``facts`` are measurements without a gate, such as the effect of rounding.

    profile: None where no model was run.
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
        """Every check passed, and there was at least one."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]

    def verdict(self) -> str:
        """One line: what failed first, by how much, and how many more."""
        if self.passed:
            return f"{self.artifact}: equivalent ({len(self.checks)} checks, {self.level})"
        if not self.checks:
            return f"{self.artifact}: not equivalent: nothing was checked"
        first = self.failures[0]
        found = "" if first.value is None else f": expected at most {first.limit:.3g}, found {first.value:.3g}"
        more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
        detail = f": {first.detail}" if first.detail else ""
        return f"{self.artifact}: not equivalent: {first.name}{found}{detail}{more}"

    def to_json(self) -> dict[str, Any]:
        """The document that ``--json`` and report.json hold."""
        return {
            "schema": SCHEMA,
            "artifact": str(self.artifact),
            "format": self.format,
            "level": self.level,
            "passed": self.passed,
            "checks": [check.to_json() for check in self.checks],
            "facts": {name: value if isinstance(value, str) else _finite(value) for name, value in self.facts.items()},
            "skipped": [{"name": skip.name, "reason": skip.reason} for skip in self.skipped],
            "rows": [one.to_json() for one in self.rows],
            "profile": self.profile.to_json() if self.profile else None,
        }


def document(reports: Sequence[Report], setting: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What report.json of one run holds. setting: where and on which bytes it was done, if that was asked for."""
    return {
        "schema": SCHEMA,
        "passed": all(report.passed for report in reports),
        **(setting or {}),
        "artifacts": [report.to_json() for report in reports],
    }


def to_bytes(found: Mapping[str, Any]) -> bytes:
    """The bytes of report.json."""
    return (json.dumps(found, indent=2, allow_nan=False) + "\n").encode()


def require_passed(reports: Sequence[Report]) -> None:
    """Raise NotEquivalent with the first verdict that is not equivalent."""
    for report in reports:
        if not report.passed:
            raise NotEquivalent(report.verdict(), document(reports))


def _finite(value: float | None) -> float | str | None:
    """JSON has no NaN or Infinity: such a value is written as its name."""
    return value if value is None or math.isfinite(value) else str(value)
