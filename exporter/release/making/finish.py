"""Finish a release: write the reports and documents next to the artifacts."""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput
from exporter.io.staging import write_file
from exporter.release.documents.signature import Signing, require_signer
from exporter.release.documents.write import write_documents
from exporter.release.facts import Release, Run
from exporter.release.making.journal import Made
from exporter.release.tables import SigningTable
from exporter.verify.report import SCHEMA, to_bytes

REPORT: Final = "report.json"


def finish(draft: Path, release: Release, run: Run, signing: SigningTable | None) -> None:
    """Write the verification reports and the documents of a release next to its artifacts in the folder ``draft``.

    Only run.json and the signature differ between two runs of the same release. Raises OutputError and every error that
    ``write_documents`` raises.
    """
    reports = [artifact.report for artifact in release.artifacts if artifact.report is not None]
    if reports:
        passed = all(report["passed"] for report in reports)
        write_file(draft / REPORT, to_bytes({"schema": SCHEMA, "passed": passed, "artifacts": reports}))
    write_documents(draft, release, run, signing=_signing(signing) if signing else None)


def require_finish(signing: SigningTable | None) -> None:
    """Raise MissingDependency or BadInput if the signing package, the private key or the key's password is unusable."""
    if signing:
        require_signer(_signing(signing))


def _signing(table: SigningTable) -> Signing:
    password = os.environ.get(table.password_env) if table.password_env else None
    if table.password_env and password is None:
        raise BadInput(f"signing.password-env: expected the environment variable {table.password_env} to be set")
    return Signing(private_key=Path(table.key) if table.key else None, password=password)


def run_facts(
    started: str, made: Mapping[str, Made], verify_seconds: Mapping[str, float], verifications: Mapping[str, str]
) -> Run:
    """Return the facts about one run for ``run.json``: times, machine, and the entries in ``jobs``."""
    jobs = {**job_facts(made), **verify_facts(verify_seconds, verifications)}
    return Run(started=started, finished=now(), invocation=str(uuid.uuid4()), host=_host(), jobs=jobs)


def job_facts(made: Mapping[str, Made]) -> dict[str, dict[str, Any]]:
    """Return the entries of ``run.json`` that describe finished jobs."""
    return {job: {"key": line.key, "seconds": line.seconds, "method": line.method} for job, line in made.items()}


def verify_facts(seconds: Mapping[str, float], verifications: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the entries of ``run.json`` that describe verifications.

    seconds: maps each model to the duration of its verification. verifications: maps each model to the digest of its
    verification settings.
    """
    return {
        f"verify {model}": {"verification": verifications[model], "seconds": duration}
        for model, duration in seconds.items()
    }


def now() -> str:
    """Return the current time in UTC, in RFC 3339 format."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _host() -> dict[str, str]:
    """Return the properties of the machine that can affect speed and rounding, without host name and user name."""
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": str(len(os.sched_getaffinity(0))),
    }
