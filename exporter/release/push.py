"""A release onto the Hugging Face hub: by huggingface_hub, which resumes what was interrupted.

Only what ``ttexport verify`` accepts is sent. Files that an earlier release had and this one has not are deleted, so
that the repository holds one release; what somebody else put there stays.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from exporter.errors import OutputError, UnreadableFile, UsageError
from exporter.release.check import check_release, require_as_released
from exporter.release.documents import manifest
from exporter.release.documents.signature import SIGNATURE
from exporter.release.documents.tensor_digests import list_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_DEFAULT_BRANCH: Final = "main"
_AGAIN: Final = "run it again with --resume: what has arrived is not sent again"


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was sent, or would be. files: path → bytes. deleted: of an earlier release. commit: None if dry."""

    repo: str
    revision: str
    message: str
    files: Mapping[str, int]
    deleted: tuple[str, ...] = ()
    commit: str | None = None
    url: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in the document of ``--json``."""
        return {
            "repo": self.repo,
            "revision": self.revision,
            "message": self.message,
            "dry_run": self.commit is None,
            "commit": self.commit,
            "url": self.url,
            "nbytes": sum(self.files.values()),
            "files": dict(self.files),
            "deleted": list(self.deleted),
        }


def in_ci() -> bool:
    """Whether this is a CI job, by the variable that all of them set. There a push is dry unless it is asked for."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def push(
    folder: Path,
    repo: str,
    *,
    revision: str | None = None,
    message: str | None = None,
    private: bool = False,
    dry_run: bool | None = None,
    endpoint: str | None = None,
    quiet: bool = False,
) -> Pushed:
    """Send the release in ``folder`` to ``repo`` (org/name, made if absent) in one commit.

    revision: a branch, made from main if absent. dry_run: say what would be sent, without network; None: in CI.
    private: of a repository that is made now. endpoint: the hub's URL, else HF_ENDPOINT's; the token is HF_TOKEN's or
    that of ``hf auth login``. Above 256 files or five minutes huggingface_hub makes several commits of it.
    Raises NotEquivalent for a folder that is not as released, UsageError for a name that the hub does not take,
    OutputError for a hub that refuses, fails or is not there: then the same call goes on where this one ended.
    """
    require_repo_id(repo)
    require_as_released(check_release(folder))
    built, _ = manifest.read(folder / manifest.NAME)
    files = {path: (folder / path).stat().st_size for path in list_files(folder)}
    told = Pushed(
        repo=repo,
        revision=revision or _DEFAULT_BRANCH,
        message=message or f"{built.name} {built.version}",
        files=files,
    )
    if in_ci() if dry_run is None else dry_run:
        return told
    try:
        return _send(folder, told, private=private, endpoint=endpoint, quiet=quiet)
    except Exception as exc:  # the errors of hub, network and files share no base class
        raise OutputError(repo, f"{_reason(exc)}; {_AGAIN}") from exc


def _send(folder: Path, told: Pushed, *, private: bool, endpoint: str | None, quiet: bool) -> Pushed:
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if quiet or not sys.stderr.isatty():  # in a log, every step of a bar is a line
        disable_progress_bars()
    api = HfApi(endpoint=endpoint)
    api.create_repo(told.repo, private=private, exist_ok=True)
    if told.revision != _DEFAULT_BRANCH:
        api.create_branch(told.repo, branch=told.revision, exist_ok=True)
    stale = sorted(_earlier_files(api, told) - told.files.keys())
    info = api.upload_folder(
        repo_id=told.repo,
        folder_path=folder,
        revision=told.revision,
        commit_message=told.message,
        allow_patterns=[glob.escape(path) for path in told.files],
        delete_patterns=[glob.escape(path) for path in stale] or None,
    )
    return replace(told, deleted=tuple(stale), commit=info.oid, url=info.commit_url)


def _earlier_files(api: HfApi, told: Pushed) -> set[str]:
    """What the release that is there now says it holds, and its signature, as far as it is there.

    Empty where there is no release, or none that can be read.
    """
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        path = Path(api.hf_hub_download(told.repo, manifest.NAME, revision=told.revision))
        listed = {entry.path for entry in manifest.read(path)[0].files}
    except (RemoteEntryNotFoundError, UnreadableFile):
        return set()
    return (listed | {SIGNATURE}) & set(api.list_repo_files(told.repo, revision=told.revision))


def require_repo_id(repo: str) -> None:
    """Raises UsageError for a name that the hub does not take."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported when asked for

    try:
        validate_repo_id(repo)
    except HFValidationError as exc:
        raise UsageError(f"--push-to-hub: expected org/name, found {repo!r:.80}") from exc
    if repo.count("/") != 1:
        raise UsageError(f"--push-to-hub: expected org/name, found {repo!r:.80}")


def _reason(exc: BaseException) -> str:
    """Why the hub did not take it, and what helps; one line."""
    from huggingface_hub import errors

    # What fails in a thread of the upload comes wrapped; the hub's answer is its cause.
    while exc.__cause__ is not None and not isinstance(exc, errors.HfHubHTTPError):
        exc = exc.__cause__
    if isinstance(exc, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids an upload: unset it"
    if isinstance(exc, errors.HfHubHTTPError):
        status = exc.response.status_code
        if status in (401, 403, 404):
            return f"the hub refuses it with HTTP {status}: set HF_TOKEN to a token that may write there"
        return f"the hub answers with HTTP {status}" + (f" ({exc.server_message})" if exc.server_message else "")
    lines = str(exc).strip().splitlines()
    return f"the hub did not take it: {type(exc).__name__}" + (f": {lines[0]}" if lines else "")
