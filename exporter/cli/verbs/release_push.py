"""Implement the option ``--push-to-hub`` of ``ttexport release``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from exporter.errors import UsageError
from exporter.release.push import Pushed, push, require_repo_id

_Command = TypeVar("_Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--push-to-hub",
        "repo",
        metavar="REPO",
        help="Upload the finished release to the hub repository REPO (org/name).",
    ),
    click.option("--revision", metavar="BRANCH", help="Branch of REPO, created if necessary; default: main."),
    click.option("--message", metavar="TEXT", help="Commit message; default: name and version of the release."),
    click.option("--private", is_flag=True, help="Make REPO private if the upload creates REPO."),
    click.option(
        "--dry-run/--no-dry-run",
        default=None,
        help="List the files of the upload, but upload nothing; default if the environment variable CI is set.",
    ),
)


def push_options(command: _Command) -> _Command:
    """Add the command-line option --push-to-hub and the options that are only valid with it."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def check_push_options(
    *, repo: str | None, revision: str | None, message: str | None, private: bool, dry_run: bool | None
) -> None:
    """Check the upload options before the release is made. Raises UsageError."""
    if repo is not None:
        require_repo_id(repo)
    elif revision or message or private or dry_run is not None:
        raise UsageError("--revision, --message, --private and --dry-run require --push-to-hub")


def push_release(
    folder: Path,
    *,
    repo: str | None,
    revision: str | None,
    message: str | None,
    private: bool,
    dry_run: bool | None,
    quiet: bool,
) -> Pushed | None:
    """Upload ``folder`` if a repository is given, and print the result to stderr.

    Raises the errors that ``exporter.release.push.push`` raises.
    """
    if repo is None:
        return None
    pushed = push(folder, repo, revision=revision, message=message, private=private, dry_run=dry_run, quiet=quiet)
    if not quiet:
        for line in _lines(pushed):
            print(line, file=sys.stderr)
    return pushed


def _lines(pushed: Pushed) -> list[str]:
    size = f"{len(pushed.files)} files, {sum(pushed.files.values()) / 1e6:.1f} MB"
    if pushed.commit is not None:
        return [f"{pushed.repo}@{pushed.revision}: {size}: {pushed.url}"]
    files = [f"  {path} ({nbytes} bytes)" for path, nbytes in pushed.files.items()]
    return [
        f"{pushed.repo}@{pushed.revision}: dry run of an upload of {size} (use --no-dry-run to upload the files):",
        *files,
    ]
