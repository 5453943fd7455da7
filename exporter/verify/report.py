"""Verification reports, which contain a verdict for each artifact and the value and limit of each check."""

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
    """The outcome of one check. If a check does not measure a number, ``value`` and ``limit`` are None."""

    name: str
    passed: bool
    value: float | None = None
    limit: float | None = None
    detail: str = ""

    @classmethod
    def at_most(cls, name: str, value: float, limit: float, detail: str = "") -> Check:
        """Return a check that passes if ``value`` is at most ``limit``, and fails if ``value`` is larger or NaN."""
        return cls(name=name, passed=value <= limit, value=value, limit=limit, detail=detail)

    def to_json(self) -> dict[str, Any]:
        """Return the check as a JSON object for the verification report."""
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
    """The verification report of one artifact.

    facts: measurements without a pass limit, such as the effect of rounding on the logits. profile: measurements from
    running the artifact, or None if no model was run.
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
        """Whether the report contains at least one check and every check passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[Check]:
        """The list of all checks that failed."""
        return [check for check in self.checks if not check.passed]

    def verdict(self) -> str:
        """Return the verdict and the number of checks as one line of text.

        If any check failed, the line contains the name, value and limit of the first failed check, and the number of
        other failed checks.
        """
        if self.passed:
            return f"{self.artifact}: equivalent ({len(self.checks)} checks, level {self.level})"
        if not self.checks:
            return f"{self.artifact}: not equivalent, because no check was run"
        first = self.failures[0]
        measured = "" if first.value is None else f": expected at most {first.limit:.3g}, found {first.value:.3g}"
        more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
        detail = f": {first.detail}" if first.detail else ""
        return f"{self.artifact}: not equivalent: {first.name}{measured}{detail}{more}"

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object for the output of ``--json`` and for report.json."""
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
    """Return the content of report.json for ``reports``.

    setting: JSON objects with the environment, the reference and the file digests, or None to omit these objects.
    """
    return {
        "schema": SCHEMA,
        "passed": all(report.passed for report in reports),
        **(setting or {}),
        "artifacts": [report.to_json() for report in reports],
    }


def to_bytes(content: Mapping[str, Any]) -> bytes:
    """Serialise ``content`` to the bytes of report.json."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def require_passed(reports: Sequence[Report]) -> None:
    """If any report failed, raise NotEquivalent with the verdict of the first failed report."""
    for report in reports:
        if not report.passed:
            raise NotEquivalent(report.verdict(), document(reports))


def _finite(value: float | None) -> float | str | None:
    """Replace NaN and infinities by their names, such as "nan", because JSON cannot represent NaN and infinities."""
    return value if value is None or math.isfinite(value) else str(value)
