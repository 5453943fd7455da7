"""Provides a Hugging Face hub repository as a local folder, and downloads the repository if it is not cached.

Configs, tokenizer files, chat templates and the required safetensors files are downloaded. Pickle files and code are
never downloaded. Downloads are stored in the cache of huggingface_hub, which is shared with other tools. Each folder in
the cache is named after a commit. huggingface_hub caches a listing of the files of each downloaded commit, with file
sizes. The cached listing shows whether the cached folder of a commit is complete.
"""

from __future__ import annotations

import glob
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from exporter.errors import BadInput, OutputError
from exporter.io.json_objects import read_object
from exporter.sources.hf.checkpoint import (
    AUXILIARY_FILES,
    AUXILIARY_PATTERNS,
    CONFIG,
    INDEX,
    MAX_INDEX_BYTES,
    VOCABULARIES,
    WEIGHTS,
    is_auxiliary,
)
from exporter.sources.peft.adapter import WEIGHTS as ADAPTER_WEIGHTS
from exporter.sources.peft.folders import CONFIG as ADAPTER_CONFIG
from exporter.sources.peft.training_record import MAX_RECORD_BYTES, RECORD

RepoContent = Literal["adapter", "checkpoint"]

#: Small files. These files are fetched first, because they determine which weights are needed.
_SMALL: Final = (CONFIG, INDEX, ADAPTER_CONFIG, *AUXILIARY_FILES, *AUXILIARY_PATTERNS)
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt")


def fetch(repo: str, revision: str, *, content: RepoContent | None, quiet: bool) -> Path:
    """Return a complete local folder of ``repo`` at ``revision`` (branch, tag or commit), named after the commit.

    If the cache contains the complete folder, the hub is not contacted. content: whether to download the weights of an
    adapter or of a checkpoint. If ``content`` is None, the adapter weights are downloaded if the repository is an
    adapter, else the checkpoint weights. Raises BadInput, naming the missing file and a remedy, if a required file
    cannot be downloaded. Raises OutputError if the cache is not writable.
    """
    from huggingface_hub import constants

    cached = _in_cache(repo, revision)
    gap = _gap(repo, cached, content) if cached else None
    if cached and not gap and _listing(repo, cached) is not None:
        return cached
    quiet = quiet or constants.HF_HUB_OFFLINE  # nothing will be downloaded
    try:
        with _no_warnings():
            folder = _download(repo, revision, content, bars=_bars(f"downloading {repo}@{revision}", quiet=quiet))
    except Exception as exc:  # the errors of hub, network and cache share no base class
        if cached and not gap:
            return cached  # without a listing, missing files cannot be detected
        if isinstance(exc, OSError) and exc.errno:
            raise OutputError(
                exc.filename or _cache(), f"the cache of huggingface_hub is not accessible: {exc.strerror}"
            ) from exc
        state = (
            f"the local cache is incomplete: {gap}" if gap else "found neither as a local folder nor in the local cache"
        )
        raise BadInput(f"{repo}@{revision}: {state}, and {_reason(repo, revision, exc)}") from exc
    if gap := _gap(repo, folder, content):
        raise BadInput(f"{repo}@{revision}: {gap}{_found_instead(repo, folder)}")
    return folder


def _in_cache(repo: str, revision: str) -> Path | None:
    """Return the cached folder of the commit that ``revision`` points to, or None if the cache lacks the commit.

    The returned folder may be incomplete.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # An empty list of patterns, so that no file counts as missing. ``_gap`` checks whether the folder is complete,
        # which depends on ``content``.
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[], local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _download(repo: str, revision: str, content: RepoContent | None, *, bars: Any) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    # If the hub refuses the download, snapshot_download returns a partial folder, but model_info raises the error.
    HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(_SMALL), tqdm_class=bars))
    sizes, content = _listing(repo, folder), content or _content_of(folder)
    weights = _weights(folder, sizes, content)
    if content == "adapter" and sizes is not None and sizes.get(RECORD, MAX_RECORD_BYTES + 1) <= MAX_RECORD_BYTES:
        weights.append(RECORD)
    # Uses the commit instead of the branch, because a branch may move between the downloads of config and weights.
    exact = [glob.escape(name) for name in weights]
    snapshot_download(repo, revision=folder.name, allow_patterns=exact, tqdm_class=bars)
    return folder


def _gap(repo: str, folder: Path, content: RepoContent | None) -> str | None:
    """Return a message about the first missing or incomplete required file, or None if the folder is complete."""
    sizes = _listing(repo, folder)
    for name in _needed(folder, sizes, content or _content_of(folder)):
        file, size = folder / name, (sizes or {}).get(name)
        if not file.is_file():  # also covers a link to a missing blob
            return f"{name} is missing"
        if size is not None and file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes (delete {file.resolve()})"
    return None


def _needed(folder: Path, sizes: Mapping[str, int] | None, content: RepoContent) -> list[str]:
    """Names of the files that the downloaded folder must contain."""
    config = ADAPTER_CONFIG if content == "adapter" else CONFIG
    if sizes is not None:
        auxiliary = [name for name in sizes if is_auxiliary(name)]
    elif content == "checkpoint" and not any((folder / name).is_file() for name in VOCABULARIES):
        auxiliary = [
            VOCABULARIES[0]
        ]  # without a listing, a folder without a vocabulary is treated as a partial download
    else:
        auxiliary = []
    return [config, *auxiliary, *_weights(folder, sizes, content)]


def _weights(folder: Path, sizes: Mapping[str, int] | None, content: RepoContent) -> list[str]:
    """Return the names of the weight files from which the model will be loaded.

    If a repository has both a single weight file and an index of shards, the single file is used.
    """
    if content == "adapter":
        return [ADAPTER_WEIGHTS]
    single = WEIGHTS in sizes if sizes is not None else (folder / WEIGHTS).is_file()
    index = folder / INDEX
    if single or not index.is_file():
        return [WEIGHTS]
    weight_map = read_object(index, max_nbytes=MAX_INDEX_BYTES).get("weight_map")
    # The reader of the checkpoint validates the index.
    return sorted({str(shard) for shard in weight_map.values()}) if isinstance(weight_map, dict) else []


def _content_of(folder: Path) -> RepoContent:
    return "adapter" if (folder / ADAPTER_CONFIG).is_file() else "checkpoint"


def _listing(repo: str, folder: Path) -> dict[str, int] | None:
    """Map the name of every file of the commit to its size in bytes, or return None if no file listing is cached."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path: file.size for file in get_cached_repo_tree(repo, revision=folder.name)}
    except CachedRepoTreeNotFoundError:
        return None


def _found_instead(repo: str, folder: Path) -> str:
    pickles = sorted(name for name in _listing(repo, folder) or {} if name.endswith(_PICKLES))
    if not pickles:
        return ""
    return (
        f"; found pickled weights ({pickles[0]}), which ttexport does not read; "
        "load the weights with transformers or PEFT, and save the weights again with save_pretrained"
    )


def _reason(repo: str, revision: str, exc: Exception) -> str:
    """Return a one-line message with the reason why the request to the hub failed and a remedy."""
    from huggingface_hub import constants, errors

    # snapshot_download reports every failure as "not in the cache". The original failure is the cause of that
    # exception.
    cause = exc.__cause__ if isinstance(exc, errors.LocalEntryNotFoundError) and exc.__cause__ else exc
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(cause, errors.HFValidationError):
        return "the name is not a valid hub repository name of the form org/name"
    if isinstance(cause, errors.OfflineModeIsEnabled):
        command = f"hf download {repo} --revision {revision}"
        return f"HF_HUB_OFFLINE forbids downloads; unset HF_HUB_OFFLINE, or run `{command}` first"
    if isinstance(cause, errors.GatedRepoError):
        return f"the repository is gated; accept the terms at {constants.ENDPOINT}/{repo}, and {login}"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return f"the repository does not exist or is private; check the name, or {login}"
    if isinstance(cause, errors.RevisionNotFoundError):
        return "the repository has no such revision; check the name of the branch, tag or commit"
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        advice = login if status in (401, 403) else "try again later"
        return f"the hub answered with HTTP {status}; {advice}"
    lines = str(cause).strip().splitlines()
    detail = f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
    return f"the download from {constants.ENDPOINT} failed; check the network and try again ({detail})"


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _bars(line: str, *, quiet: bool) -> Any:
    """Return the progress bar class to pass to huggingface_hub, or None for the default class of huggingface_hub.

    If standard error is a terminal and ``quiet`` is not set, None is returned. If standard error is not a terminal, or
    if ``quiet`` is set, the returned class shows no progress bar. ``line`` is printed if standard error is not a
    terminal and ``quiet`` is not set. The function of huggingface_hub that disables all progress bars is not used,
    because an environment variable can override the function.
    """
    from huggingface_hub.utils.tqdm import tqdm

    if not quiet and sys.stderr.isatty():
        return None

    class Hidden(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options["disable"] = True
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]  # tqdm has no annotations

    if not quiet:
        print(line, file=sys.stderr, flush=True)
    return Hidden


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Suppress the log messages of huggingface_hub, because the raised error contains all relevant information."""
    from huggingface_hub.utils import logging as hub_logging

    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)
