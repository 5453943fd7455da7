"""Push a release to the Hugging Face hub with huggingface_hub, which can resume interrupted uploads.

Only a release that ``ttexport verify`` accepts is uploaded. Files of an earlier release that are missing from the new
release are deleted, so that the repository contains exactly one release. Files in the repository that do not belong to
any release are kept.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from exporter.errors import OutputError, UnreadableFile, UsageError, foreign_line
from exporter.release.check import check_release, require_as_released
from exporter.release.documents import manifest
from exporter.release.documents.signature import SIGNATURE
from exporter.release.documents.tensor_digests import list_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_DEFAULT_BRANCH: Final = "main"
_RETRY: Final = "run the command again with --resume to upload only the missing files"


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """An upload, or the preview of an upload. files: maps each path to the file size in bytes.

    deleted: files of an earlier release that the upload deletes. commit: id of the commit; None for a preview.
    """

    repo: str
    revision: str
    message: str
    files: Mapping[str, int]
    deleted: tuple[str, ...] = ()
    commit: str | None = None
    url: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the value of the entry ``pushed`` in the JSON document that ``--json`` prints."""
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
    """Whether the process runs in a CI job, according to the environment variable CI.

    In a CI job, a push is a dry run by default.
    """
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
    """Upload the release in ``folder`` to ``repo`` in one commit.

    repo: org/name; created if the repository does not exist. revision: a branch; created from main if the branch does
    not exist. dry_run: upload nothing, and return only a preview of the upload; None means a dry run only in a CI job.
    private: whether a repository that is created by the upload is private. endpoint: URL of the hub, by default
    HF_ENDPOINT. The access token is HF_TOKEN, or else the token stored by ``hf auth login``. If an upload has more than
    256 files or lasts more than five minutes, huggingface_hub makes two or more commits. Raises NotEquivalent if the
    files in the folder do not match the manifest of the release, UsageError if the repository id is invalid, and
    OutputError if the upload fails. After an interrupted upload, calling ``push`` again resumes the upload.
    """
    require_repo_id(repo)
    require_as_released(check_release(folder))
    released, _ = manifest.read(folder / manifest.NAME)
    files = {path: (folder / path).stat().st_size for path in list_files(folder)}
    preview = Pushed(
        repo=repo,
        revision=revision or _DEFAULT_BRANCH,
        message=message or f"{released.name} {released.version}",
        files=files,
    )
    if in_ci() if dry_run is None else dry_run:
        return preview
    try:
        return _send(folder, preview, private=private, endpoint=endpoint, quiet=quiet)
    except Exception as exc:  # the errors of hub, network and files have no common base class
        raise OutputError(repo, f"{_reason(exc)}; {_RETRY}") from exc


def _send(folder: Path, preview: Pushed, *, private: bool, endpoint: str | None, quiet: bool) -> Pushed:
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if quiet or not sys.stderr.isatty():  # in a log file, each update of a progress bar would be a line
        disable_progress_bars()
    api = HfApi(endpoint=endpoint)
    api.create_repo(preview.repo, private=private, exist_ok=True)
    if preview.revision != _DEFAULT_BRANCH:
        api.create_branch(preview.repo, branch=preview.revision, exist_ok=True)
    stale = sorted(_earlier_files(api, preview) - preview.files.keys())
    info = api.upload_folder(
        repo_id=preview.repo,
        folder_path=folder,
        revision=preview.revision,
        commit_message=preview.message,
        allow_patterns=[glob.escape(path) for path in preview.files],
        delete_patterns=[glob.escape(path) for path in stale] or None,
    )
    return replace(preview, deleted=tuple(stale), commit=info.oid, url=info.commit_url)


def _earlier_files(api: HfApi, preview: Pushed) -> set[str]:
    """Return the paths of the files in the repository that belong to the earlier release.

    The files of a release are the signature and the files that the manifest of the release lists. The result is empty
    if the repository has no manifest or if the manifest cannot be read.
    """
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        path = Path(api.hf_hub_download(preview.repo, manifest.NAME, revision=preview.revision))
        listed = {entry.path for entry in manifest.read(path)[0].files}
    except (RemoteEntryNotFoundError, UnreadableFile):
        return set()
    return (listed | {SIGNATURE}) & set(api.list_repo_files(preview.repo, revision=preview.revision))


def require_repo_id(repo: str) -> None:
    """Raise UsageError for an invalid repository id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported lazily

    try:
        validate_repo_id(repo)
    except HFValidationError as exc:
        raise UsageError(f"--push-to-hub: expected org/name, found {repo!r:.80}") from exc
    if repo.count("/") != 1:
        raise UsageError(f"--push-to-hub: expected org/name, found {repo!r:.80}")


def _reason(exc: BaseException) -> str:
    """Return one line with the reason why the upload failed, and with the remedy if a remedy is known."""
    from huggingface_hub import errors

    # Errors in upload threads are wrapped. The answer of the hub is the cause of the wrapped error.
    while exc.__cause__ is not None and not isinstance(exc, errors.HfHubHTTPError):
        exc = exc.__cause__
    if isinstance(exc, errors.OfflineModeIsEnabled):
        return "the environment variable HF_HUB_OFFLINE disables uploads; unset HF_HUB_OFFLINE"
    if isinstance(exc, errors.HfHubHTTPError):
        status = exc.response.status_code
        if status in (401, 403, 404):
            return f"the hub refused the upload with HTTP {status}; set HF_TOKEN to a token with write access"
        return f"the hub answered with HTTP {status}" + (f" ({exc.server_message})" if exc.server_message else "")
    return f"the upload failed: {type(exc).__name__}: {foreign_line(exc, 0)}"
