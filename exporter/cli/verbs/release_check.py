"""Implement ``ttexport verify`` for a release folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from exporter.cli.console import print_reports
from exporter.errors import UsageError
from exporter.release.check import check_release, require_as_released
from exporter.release.documents.signature import Trust
from exporter.verify.report import document, to_bytes

_Command = TypeVar("_Command", bound=Callable[..., Any])


def trust_options(command: _Command) -> _Command:
    """Add the command-line options --public-key, --identity and --issuer."""
    for option in (
        click.option("--issuer", metavar="URL", help="OIDC issuer of --identity."),
        click.option("--identity", metavar="NAME", help="Identity that must have signed the release through Sigstore."),
        click.option(
            "--public-key",
            type=click.Path(path_type=Path),
            metavar="PEM",
            help="Public key of the required signer of the release.",
        ),
    ):
        command = option(command)
    return command


def read_trust(public_key: Path | None, identity: str | None, issuer: str | None) -> Trust | None:
    """Return the signer that the user requires, or None if no signer is required.

    Raises UsageError if --public-key, --identity and --issuer contradict each other.
    """
    if (identity is None) != (issuer is None):
        raise UsageError("--identity and --issuer must be given together")
    if public_key and identity:
        raise UsageError("--public-key and --identity are mutually exclusive")
    return Trust(public_key=public_key, identity=identity, issuer=issuer) if public_key or identity else None


def verify_release(folder: Path, trust: Trust | None, *, as_json: bool, quiet: bool) -> None:
    """Check a release folder and print the result. Raises NotEquivalent if a check of the release fails."""
    report = check_release(folder, trust)
    if as_json and report.passed:
        click.echo(to_bytes(document([report])).decode(), nl=False)
    elif not quiet:
        print_reports([report])
    require_as_released(report)
    if not (quiet or as_json):
        print(f"{folder}: the folder matches its manifest ({len(report.checks)} checks)", file=sys.stderr)
